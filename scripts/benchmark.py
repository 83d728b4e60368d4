"""How fast, beside what a user would install instead: python scripts/benchmark.py --output benchmarks/cpu.md.

Contenders run in turns, so that whatever else the machine does meets them all alike. Rows give medians, and ratios to
the first contender in float32.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torchvision
from benchmark_peers import Case
from benchmark_workers import Precision, Worker, is_installed

from detr_backbone.training import parse_options, plain_errors

MIXED = ((800, 1088), (640, 1000), (768, 800), (480, 640))
PEERS = ("original", "ours", "timm", "hugging_face")
GETTERS = ("bare", "sequential", "graph", "hooks")
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
                GETTERS,
                ("float32",),
            )
            for network in ("resnet18", "resnet50")
        ],
        "compiled": [
            Row(replace(at, kind=kind), ("original", "ours", "original, compiled", "ours, compiled"))
            for kind in ("forward", "step")
        ],
        "data": [
            Row(
                replace(at, kind="data", sizes=((480, 640),) * 8),
                ("torchvision pipeline", "our pipeline"),
                ("float32",),
            )
        ],
        "scaling": [
            Row(replace(at, sizes=sizes), ("original", "ours"))
            for sizes in (((400, 544),), ((800, 1088),), ((1200, 1632),), ((800, 1088),) * 2, ((800, 1088),) * 4)
        ],
    }


def measure(row: Row, *, runs: int, threads: Sequence[int], kernels: int) -> list[str]:
    """The rows of one case in Markdown, and the kernels that took most of the time."""
    contenders = [name for name in row.contenders if is_installed(name)]
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
                f"{len(row.case.sizes) / median:.2f} | {reference / median:.2f} | {same / median:.2f} | {share:.0%} | "
                f"{worker.peak():.0f} |"
            )
            if kernels:
                shares = list(worker.kernels().items())[:kernels]
                lines[-1] += f" {', '.join(f'{kernel} {share:.0%}' for kernel, share in shares)} |"
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
        f"| import {names} | - | - | - | {1000 * statistics.median(taken[1:]):.0f} | | | {before / after:.2f} | | | |"
        for names, taken in seconds.items()
    ]
    print("\n".join(lines), flush=True)
    return lines


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


def has_bf16_instructions() -> bool:
    """Whether the processor multiplies bf16 itself."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


RATIOS = ("times as fast as the first in float32", "as the first in this precision")
COLUMNS = ("case", "precision", "contender", "threads", "ms", "spread", "images/s", *RATIOS, "of matmul", "peak MiB")


def main(
    *,
    suite: str = "table",
    runs: int = 7,
    device: Literal["cpu", "cuda"] = "cpu",
    precisions: tuple[Precision, ...] = BOTH,
    kernels: int = 0,
    output: str | None = None,
) -> None:
    """Measure speed beside peers.

    A contender runs at the number of threads, one or one per core, that is faster for it in two runs before.

    Args:
        suite: table, backbones, detectors, getter, compiled, data, scaling or import.
        runs: measured runs of every contender, in turns; the median counts.
        device: cpu or cuda.
        precisions: float32, bf16, or both; bf16 is left out on a processor that has no instructions for it.
        kernels: how many of the kernels that took most of the time each row names.
        output: the Markdown file of the record; printed only, if left out.
    """
    cores = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    columns = (*COLUMNS, "kernels") if kernels else COLUMNS
    remarks = [f"`{' '.join(['python', *sys.argv])}`", f"{environment(device)}; medians of {runs} runs in turns."]
    rows = [] if suite == "import" else suites(device)[suite]
    asked = {precision for row in rows for precision in row.precisions if precision in precisions}
    if device == "cpu" and "bf16" in asked and not has_bf16_instructions():
        asked.remove("bf16")
        remarks.append("bf16 is left out: this processor has no instructions for it, and takes minutes for an image.")
        print(remarks[-1], flush=True)
    if suite == "import":
        lines = measure_import(runs)
    else:
        rows = [row._replace(precisions=[p for p in row.precisions if p in asked]) for row in rows]
        lines = [line for row in rows for line in measure(row, runs=runs, threads=sorted({1, cores}), kernels=kernels)]
    if output is not None:
        table = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *lines]
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text("\n\n".join([*remarks, "\n".join(table)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with plain_errors():
        main(**parse_options(main))
