"""How fast, beside what a user would install instead: python benchmarks/run.py --output benchmarks/cpu.md.

Contenders run in turns, so that whatever else the machine does meets them all alike. Rows give medians, and ratios to
the first contender in float32.
"""

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
import torchvision
from engines import PRECISIONS, exported_files
from peers import Case
from workers import Precision, Worker, lacking

from detr_backbone.commands.command_line import Command

MIXED = ((800, 1088), (640, 1000), (768, 800), (480, 640))
NETWORKS = ("resnet18", "resnet50", "resnet101", "resnet50-dc5")
PEERS = ("original", "ours", "timm", "hugging_face")
GETTERS = ("bare", "sequential", "graph", "hooks")
COMPILED = ("original", "ours", "original, compiled", "ours, compiled")
FOLDED = ("original", "ours", "ours, folded", "onnxruntime", "openvino")
DEPLOYED = (*COMPILED, "ours, folded", "onnxruntime", "openvino")
BOTH: tuple[Precision, ...] = ("float32", "bf16")
ALL: tuple[Precision, ...] = (*BOTH, "int8")


Contender: TypeAlias = tuple[str, Precision]


class Row(NamedTuple):
    """A case, who takes part in it, and in which precisions."""

    case: Case
    contenders: Sequence[str] = PEERS
    precisions: Sequence[Precision] = BOTH


def suites(device: str) -> dict[str, list[Row]]:
    """What is measured, by name."""
    at = Case(kind="forward", device=device)
    return {
        "table": [
            Row(at, ("original", "ours")),
            Row(replace(at, kind="step"), ("original", "ours")),
            Row(replace(at, sizes=MIXED), ("original", "ours")),
            Row(replace(at, kind="detr", levels=1), ("original", "ours")),
            Row(replace(at, kind="deformable_detr_step"), ("original", "ours")),
        ],
        **{
            network: [
                Row(replace(at, network=network, levels=levels, kind=kind, sizes=sizes))
                for levels in (1, 4)
                for kind in ("forward", "step")
                for sizes in (at.sizes, MIXED)
            ]
            for network in NETWORKS
        },
        "detectors": [
            Row(replace(at, kind="detr", levels=1), ("original", "ours", "hugging_face")),
            Row(replace(at, kind="detr_step", levels=1), ("original", "ours")),
            Row(replace(at, kind="deformable_detr"), ("original", "ours")),
        ],
        "getter": [
            Row(
                replace(at, kind="getter", levels=1, network=network),
                GETTERS,
                ("float32",),
            )
            for network in ("resnet18", "resnet50")
        ],
        "padding": [
            Row(replace(at, network=network, kind=kind, sizes=MIXED), ("ours, zeros", "ours"))
            for network in ("resnet18", "resnet50")
            for kind in ("forward", "step")
        ],
        "plans": [
            Row(replace(at, kind=kind, sizes=sizes), ("ours, whole batch", "ours, by size", "ours, zeros"))
            for sizes in (MIXED, (*MIXED[:2], *MIXED[:2]))
            for kind in ("forward", "step")
        ],
        "compiled": [
            Row(case, COMPILED) for case in (at, replace(at, kind="step"), replace(at, kind="detr", levels=1))
        ],
        "engines": [
            Row(case, DEPLOYED, ALL)
            for case in (
                at,
                replace(at, sizes=((224, 224),)),
                replace(at, sizes=MIXED),
                replace(at, kind="detr", levels=1),
                replace(at, kind="deformable_detr"),
            )
        ],
        "folded": [Row(replace(at, sizes=sizes), FOLDED, ALL) for sizes in (at.sizes, ((224, 224),), MIXED)],
        "folded_detectors": [
            Row(replace(at, kind="detr", levels=1), FOLDED, ALL),
            Row(replace(at, kind="deformable_detr"), FOLDED, ALL),
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


def measure(
    row: Row, *, runs: int, processes: int, threads: tuple[int, ...], kernels: int
) -> tuple[list[str], list[str]]:
    """The rows of one case in Markdown, with the kernels that took most of the time; and which contenders failed."""
    remarks = []
    pairs = [
        (name, precision)
        for precision in row.precisions
        for name in (*row.contenders, "matmul")
        if precision in PRECISIONS.get(name, BOTH)
    ]
    image = replace(row.case, sizes=row.case.sizes[:1])
    best = {pair: best_threads(pair, image, threads) for pair in pairs}
    workers: dict[Contender, Worker] = {}
    seconds: dict[Contender, list[float]] = {pair: [] for pair in pairs}
    for turn in range(runs):
        if turn % -(-runs // processes) == 0:  # how feature maps fall into memory differs between processes
            for worker in workers.values():
                worker.close()
            workers = {pair: Worker(*pair, row.case, best[pair]) for pair in pairs}
            if row.case.device == "cuda":  # they compile beside each other, on cores of their own
                for worker in workers.values():
                    worker.begin()
            for pair, worker in list(workers.items()):
                try:
                    worker.warm_up()
                except RuntimeError as error:
                    remarks.append(f"{row.case}: {error}")
                    print(remarks[-1], flush=True)
                    worker.close()
                    del workers[pair]
                    pairs.remove(pair)
        for pair, worker in workers.items():
            seconds[pair].append(worker.run())
    first = row.contenders[0]
    medians = {pair: statistics.median(seconds[pair]) for pair in pairs}
    peaks = {pair: worker.peak() for pair, worker in workers.items()}  # before operations are counted, in one more run
    flops: dict[str, float] = {}  # 0 for an engine of its own, whose operations torch does not see
    for name, precision in pairs:
        if name not in flops:
            flops[name] = workers[name, precision].flops()
    lines = []
    for precision in row.precisions:
        matmul = "matmul", precision
        peak_rate = flops["matmul"] / medians[matmul] if matmul in medians else 0
        for name in row.contenders:
            pair = name, precision
            if pair not in medians:
                continue
            median = medians[pair]
            cells = [
                *(str(row.case), precision, name, str(best[pair]), *in_cells(seconds[pair])),
                f"{len(row.case.sizes) / median:.2f}",
                *(
                    f"{medians[first, of] / median:.2f}" if (first, of) in medians else "-"
                    for of in ("float32", precision)
                ),
                f"{peaks[pair]:.0f}",
                f"{flops[name] / median / peak_rate:.0%}" if flops[name] and peak_rate else "-",
            ]
            if kernels:
                shares = list(workers[pair].kernels().items())[:kernels]
                cells.append(", ".join(f"{kernel} {share:.0%}" for kernel, share in shares))
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    for worker in workers.values():
        worker.close()
    return lines, remarks


@cache
def best_threads(contender: Contender, image: Case, threads: tuple[int, ...]) -> int:
    """The number of threads that the contender is fastest with on one image, by the fastest of a few runs of each."""
    if len(threads) == 1:
        return threads[0]
    workers = {count: Worker(*contender, image, count) for count in threads}
    for worker in workers.values():
        worker.warm_up()
    turns = [{count: worker.run() for count, worker in workers.items()} for _ in range(4)]
    taken = {count: min(turn[count] for turn in turns) for count in threads}
    for worker in workers.values():
        worker.close()
    return min(taken, key=taken.__getitem__)


def in_cells(seconds: Sequence[float]) -> tuple[str, str]:
    """The median in milliseconds, and how far apart the fastest and the slowest run lie, as a share of it."""
    median = statistics.median(seconds)
    return f"{1000 * median:.{0 if median >= 0.1 else 1}f}", f"{(max(seconds) - min(seconds)) / median:.0%}"


def measure_import(runs: int) -> list[str]:
    """What importing the package costs after torch and torchvision, in fresh interpreters."""
    names = ("torch, torchvision", "detr_backbone")
    steps = [f"start = time.perf_counter(); import {name}; print(time.perf_counter() - start)" for name in names]
    command = [sys.executable, "-c", "; ".join(["import time", *steps])]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(runs + 1)]
    seconds = zip(*(map(float, output.split()) for output in outputs[1:]), strict=True)  # the first fills file caches
    lines = []
    for name, taken in zip(names, seconds, strict=True):
        lines.append(f"| import {name} | - | - | - | {' | '.join(in_cells(taken))} | | | | | |")
    print("\n".join(lines), flush=True)
    return lines


def environment(device: str) -> str:
    """Where and on what the numbers were taken."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    if device == "cuda":
        convolutions, products = (
            "TF32" if allowed else "float32"
            for allowed in (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
        )
        name = f"{torch.cuda.get_device_name()} (float32: convolutions in {convolutions}, products in {products})"
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
COLUMNS = ("case", "precision", "contender", "threads", "ms", "spread", "images/s", *RATIOS, "peak MiB", "of matmul")


def main(
    *,
    suite: str = "table",
    runs: int = 9,
    processes: int = 3,
    device: Literal["cpu", "cuda"] = "cpu",
    precisions: tuple[Precision, ...] = ALL,
    threads: int | None = None,
    kernels: int = 0,
    output: str | None = None,
) -> None:
    """Measure speed beside peers.

    Args:
        suite: table, detectors, getter, padding, plans, compiled, engines, folded, folded_detectors, data, scaling,
            import, or a backbone: resnet18, resnet50, resnet101, resnet50-dc5.
        runs: measured runs of every contender, in turns; the median counts.
        processes: in how many processes, one after the other, a contender does its runs.
        device: cpu or cuda.
        precisions: float32, bf16 and int8, which OpenVINO alone computes in, of those that the suite has; bf16 is left
            out on a processor that has no instructions for it.
        threads: of every contender; if left out, one or one per core, whichever is faster for it with one image.
        kernels: how many of the kernels that took most of the time each row names.
        output: the Markdown file of the record, which grows with every case; printed only, if left out.
    """
    cores = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    counts = tuple(sorted({1, cores})) if threads is None else (threads,)
    columns = (*COLUMNS, "kernels") if kernels else COLUMNS
    rows = [] if suite == "import" else suites(device)[suite]
    asked = {precision for row in rows for precision in row.precisions if precision in precisions}
    taken = f"medians of {runs} runs"
    if rows:
        taken += " in turns"
        if processes > 1:
            taken += f", in {processes} processes of each contender"
    remarks = [f"`{' '.join(['python', *sys.argv])}`", f"{environment(device)}; {taken}."]
    if device == "cpu" and "bf16" in asked and not has_bf16_instructions():
        asked.remove("bf16")
        remarks.append("bf16 is left out: this processor has no instructions for it, and takes minutes for an image.")
    for name, module in lacking({name for row in rows for name in row.contenders}).items():
        rows = [row._replace(contenders=[other for other in row.contenders if other != name]) for row in rows]
        remarks.append(f"{name} is left out: {module} is not installed.")
    print("\n".join(remarks), flush=True)
    table = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    if suite == "import":
        table += measure_import(runs)
        write(output, remarks, table)
    with exported_files():
        for row in rows:
            case = row._replace(precisions=[precision for precision in row.precisions if precision in asked])
            lines, failed = measure(case, runs=runs, processes=processes, threads=counts, kernels=kernels)
            table += lines
            remarks += failed
            write(output, remarks, table)


def write(output: str | None, remarks: Sequence[str], table: Sequence[str]) -> None:
    """Write the record so far, if it goes to a file."""
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text("\n\n".join([*remarks, "\n".join(table)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    COMMAND = Command(name="python benchmarks/run.py", main=main, example="python benchmarks/run.py")
    sys.exit(COMMAND.run(sys.argv[1:]))
