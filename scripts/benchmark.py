"""How fast, beside what a user would install instead: python scripts/benchmark.py --output benchmarks/cpu.md.

Every contender of a case lives in a process of its own, and they run in turns, so that whatever else the machine does
meets them all alike. Rows give medians, and ratios to the original construction in float32.
"""

import importlib.util
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torchvision
from benchmark_peers import CONTENDERS, Case
from torch.utils.flop_counter import FlopCounterMode

from detr_backbone.training import parse_options, plain_errors

MIXED = ((800, 1088), (640, 1000), (768, 800), (480, 640))
PEERS = ("original", "ours", "timm", "hugging_face")
GETTERS = ("bare", "sequential", "graph", "hooks")
Precision = Literal["float32", "bf16"]
BOTH: tuple[Precision, ...] = ("float32", "bf16")


class Row(NamedTuple):
    """A case, who takes part in it, and in which precisions."""

    case: Case
    contenders: Sequence[str] = PEERS
    precisions: Sequence[Precision] = BOTH


def suites(device: str) -> dict[str, list[Row]]:
    """What is measured, by name."""
    at = Case(kind="forward", device=device)
    detector = ((800, 1088),)
    return {
        "table": [
            Row(at, ("original", "ours")),
            Row(replace(at, kind="step"), ("original", "ours")),
            Row(replace(at, sizes=MIXED), ("original", "ours")),
            Row(replace(at, kind="detr", levels=1, sizes=detector), ("original", "ours")),
            Row(replace(at, kind="deformable_detr_step", sizes=detector), ("original", "ours")),
        ],
        "backbones": [
            Row(replace(at, network=network, levels=levels, kind=kind, sizes=sizes))
            for network in ("resnet18", "resnet50", "resnet101", "resnet50-dc5")
            for levels in (1, 4)
            for kind in ("forward", "step")
            for sizes in (at.sizes, MIXED)
        ],
        "detectors": [
            Row(replace(at, kind="detr", levels=1)),
            Row(replace(at, kind="detr_step", levels=1), ("original", "ours")),
            Row(replace(at, kind="deformable_detr"), ("original", "ours")),
            Row(replace(at, kind="deformable_detr_step"), ("original", "ours")),
        ],
        "getter": [
            Row(
                replace(at, kind="getter", levels=1, network=network),
                ("bare", "sequential", "graph", "hooks"),
                ("float32",),
            )
            for network in ("resnet18", "resnet50")
        ],
        "scaling": [
            Row(replace(at, sizes=sizes), ("original", "ours"))
            for sizes in (((400, 544),), ((800, 1088),), ((1200, 1632),), ((800, 1088),) * 2, ((800, 1088),) * 4)
        ],
    }


class Worker:
    """A contender in a process of its own."""

    def __init__(self, name: str, case: Case, precision: Precision, threads: int) -> None:
        self.name, self.precision, self.threads = name, precision, threads
        os.environ["OMP_NUM_THREADS"] = str(threads)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, case, precision, threads), daemon=True)
        self._process.start()
        theirs.close()
        self.flops = self._receive()
        self.seconds: list[float] = []

    def run(self) -> None:
        self._connection.send("run")
        self.seconds.append(self._receive())

    def peak(self) -> float:
        """MiB: resident memory of the process on a CPU, allocated memory on a GPU."""
        self._connection.send("peak")
        return float(self._receive())

    def close(self) -> None:
        self._connection.send("stop")
        self._process.join()

    def _receive(self) -> Any:
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer


def _serve(connection: Connection, name: str, case: Case, precision: Precision, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        work = _matmul(case.device, precision) if name == "matmul" else CONTENDERS[name](case)

        def run() -> float:
            start = time.perf_counter()
            with torch.autocast(case.device, torch.bfloat16, enabled=precision == "bf16"):
                work()
            if case.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        with FlopCounterMode(display=False) as counter:
            run()
        run()
        connection.send(counter.get_total_flops())
        while (order := connection.recv()) != "stop":
            connection.send(run() if order == "run" else _peak(case.device))
    except Exception as error:  # the parent tells it
        connection.send(f"{type(error).__name__}: {error}")


def _matmul(device: str, precision: Precision) -> Any:
    """A large product of matrices in the dtype itself: the machine's limit."""
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return lambda: matrix @ matrix


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(row: Row, *, runs: int, threads: Sequence[int]) -> list[str]:
    """The rows of one case in Markdown."""
    contenders = [name for name in row.contenders if _installed(name)]
    workers = [
        Worker(name, row.case, precision, count)
        for precision in row.precisions
        for name in (*contenders, "matmul")
        for count in threads
    ]
    for worker in workers * 2:
        worker.run()
    best: dict[tuple[str, Precision], Worker] = {}
    for worker in sorted(workers, key=lambda worker: min(worker.seconds), reverse=True):
        best[worker.name, worker.precision] = worker
    for worker in set(workers).difference(best.values()):
        worker.close()
    for worker in best.values():
        worker.seconds.clear()
    for _ in range(runs):
        for worker in best.values():
            worker.run()
    reference = statistics.median(best[contenders[0], row.precisions[0]].seconds)
    lines = []
    for precision in row.precisions:
        limit = best["matmul", precision]
        peak_rate = limit.flops / statistics.median(limit.seconds)
        same = statistics.median(best[contenders[0], precision].seconds)
        for name in contenders:
            worker = best[name, precision]
            median = statistics.median(worker.seconds)
            spread = (max(worker.seconds) - min(worker.seconds)) / median
            share = worker.flops / median / peak_rate
            lines.append(
                f"| {row.case} | {precision} | {name} | {worker.threads} | {1000 * median:.0f} | {spread:.0%} | "
                f"{reference / median:.2f} | {same / median:.2f} | {share:.0%} | {worker.peak():.0f} |"
            )
            print(lines[-1], flush=True)
    for worker in best.values():
        worker.close()
    return lines


def measure_import(runs: int) -> list[str]:
    """What importing the package costs on top of importing torch and torchvision, each in a fresh interpreter."""
    seconds: dict[str, list[float]] = {"torch, torchvision": [], "torch, torchvision, detr_backbone": []}
    for _ in range(runs + 1):
        for names, taken in seconds.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {names}"], check=True)
            taken.append(time.perf_counter() - start)
    before, after = (statistics.median(taken[1:]) for taken in seconds.values())  # the first filled the file cache
    lines = [
        f"| import {names} | - | - | - | {1000 * statistics.median(taken[1:]):.0f} | | {before / after:.2f} | | | |"
        for names, taken in seconds.items()
    ]
    print("\n".join(lines), flush=True)
    return lines


def _installed(name: str) -> bool:
    module = {"timm": "timm", "hugging_face": "transformers"}.get(name)
    found = module is None or importlib.util.find_spec(module) is not None
    if not found:
        print(f"{name} is left out: {module} is not installed", flush=True)
    return found


def environment(device: str) -> str:
    """Where and on what the numbers were taken."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = f"{models[0].partition(':')[2].strip()}, {len(models)} cores"
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {name}, {platform.system()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, commit {commit.stdout.strip() or 'unknown'}"
    )


RATIOS = ("times as fast as the first in float32", "as the first in this precision")
COLUMNS = ("case", "precision", "contender", "threads", "ms", "spread", *RATIOS, "of matmul", "peak MiB")


def main(
    *, suite: str = "table", runs: int = 7, device: Literal["cpu", "cuda"] = "cpu", output: str | None = None
) -> None:
    """Measure speed beside peers.

    A contender runs at the number of threads, one or one per core, that is faster for it in two runs before.

    Args:
        suite: table, backbones, detectors, getter, scaling or import.
        runs: measured runs of every contender, in turns; the median counts.
        device: cpu or cuda.
        output: the Markdown file of the record; printed only, if left out.
    """
    cores = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    if suite == "import":
        lines = measure_import(runs)
    else:
        rows = suites(device)[suite]
        lines = [line for row in rows for line in measure(row, runs=runs, threads=sorted({1, cores}))]
    command = " ".join(["python", *sys.argv])
    header = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    record = f"`{command}`\n\n{environment(device)}; medians of {runs} runs in turns.\n\n{header}"
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(record + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with plain_errors():
        main(**parse_options(main))
