"""The records as tables and a chart: python benchmarks/summary.py.

Prints the tables of README.md, docs/speed.md and docs/deploy.md, and draws docs/speed.jpg.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

FOLDER = Path(__file__).parent
PROCESSORS = {
    "zen3": "AMD EPYC, Zen 3",
    "zen4": "AMD EPYC, Zen 4",
    "zen5": "AMD EPYC, Zen 5",
    "intel": "Intel Xeon, AMX",
    "xeon": "Intel Xeon, AVX-512",
}
"""By the end of a record's name; a record itself has what the processor says of itself."""
PRECISIONS = ("float32", "bf16")


class Row(NamedTuple):
    """One contender in one case and precision, as a record has it."""

    case: str
    precision: str
    contender: str
    milliseconds: float
    images_per_second: float
    spread: float


class Work(NamedTuple):
    """A kind of work that is measured: its name, and how the names of its cases begin."""

    name: str
    begins: str
    padded: bool = False

    def holds(self, case: str) -> bool:
        """Return whether a case of a record is of this kind."""
        return case.startswith(f"{self.begins},") and (" padded " in case) == self.padded


FORWARD, STEP = Work("forward", "forward"), Work("training step", "step")
PADDED, PADDED_STEP = (
    Work("padded, forward", "forward", padded=True),
    Work("padded, training step", "step", padded=True),
)
DETR, DETR_STEP = Work("DETR, forward", "detr"), Work("DETR, training step", "detr step")
DEFORMABLE, DEFORMABLE_STEP = (
    Work("Deformable DETR, forward", "deformable detr"),
    Work("Deformable DETR, training step", "deformable detr step"),
)
WORK = (FORWARD, STEP, PADDED, PADDED_STEP, DETR, DETR_STEP, DEFORMABLE, DEFORMABLE_STEP)


def read_record(path: Path) -> list[Row]:
    """Return the measured rows of a record, whatever other columns its table has."""
    lines = [line.strip("| ").split(" | ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    heading = lines[0]
    rows = [dict(zip(heading, line, strict=True)) for line in lines[2:]]
    return [
        Row(
            row["case"],
            row["precision"],
            row["contender"],
            float(row["ms"]),
            float(row["images/s"]),
            float(row["spread"].strip("%")) / 100,
        )
        for row in rows
    ]


def speed_ratio(rows: Sequence[Row], case: str, precision: str) -> float | None:
    """Return how many times as fast ours is as the fastest other contender in the same case and precision."""
    times = {row.contender: row.milliseconds for row in rows if (row.case, row.precision) == (case, precision)}
    ours = times.pop("ours", None)
    return min(times.values()) / ours if ours is not None and times else None


def summarised() -> list[Path]:
    """Return the records of backbones and detectors beside their peers on processors."""
    names = re.compile(rf"(table|detectors|resnet).*-({'|'.join(PROCESSORS)})")
    return [path for path in sorted(FOLDER.glob("*.md")) if names.fullmatch(path.stem)]


def on_a_gpu() -> list[list[Path]]:
    """Return the records of docs/speed.md that were taken on a GPU, by table."""
    return [
        [FOLDER / f"{suite}-h100.md" for suite in suites]
        for suites in (("table", "detectors"), ("compiled",), ("plans",))
    ]


def summary_table(paths: Sequence[Path]) -> str:
    """Return the table of docs/speed.md: a row for each record and precision, a column for each kind of work."""
    lines = [
        f"| record | network | precision | {' | '.join(work.name for work in WORK)} | spread |",
        f"|{'---|' * (len(WORK) + 4)}",
    ]
    for path in paths:
        rows = read_record(path)
        network = rows[0].case.split(", ")[1]
        for precision in PRECISIONS:
            measured = [row for row in rows if row.precision == precision]
            if measured:
                cells = [_ratios(rows, work, precision) for work in WORK]
                spread = f"{max(row.spread for row in measured):.0%}"
                link = f"[{path.stem}](../benchmarks/{path.name})"
                lines.append(f"| {' | '.join((link, network, precision, *cells, spread))} |")
    return "\n".join(lines)


def milliseconds_table(path: Path) -> str:
    """Return the table of README.md: milliseconds of the original and of ours, each precision against itself."""
    rows = read_record(path)
    times = {(row.case, row.precision, row.contender): row.milliseconds for row in rows}
    lines = [
        "| milliseconds | original, bf16 | ours, bf16 | | original, float32 | ours, float32 | |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row.case for row in rows):
        (name,) = (work.name for work in WORK if work.holds(case))
        cells = []
        for precision in reversed(PRECISIONS):
            original, ours = (times[case, precision, contender] for contender in ("original", "ours"))
            cells += [f"{original:.0f}", f"{ours:.0f}", f"{original / ours:.1f} x"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def engines() -> list[Path]:
    """Return the records of docs/deploy.md and README.md: in PyTorch and in engines."""
    return [FOLDER / "folded-xeon.md", FOLDER / "folded_detectors-xeon.md"]


def contenders_table(
    paths: Sequence[Path], value: Literal["milliseconds", "images_per_second"] = "milliseconds", *, size: str = ""
) -> str:
    """Return a table with a row for each case and precision of the records, and a column for each contender.

    Args:
        paths: of the records.
        value: what it tells.
        size: how the names of the cases end.
    """
    rows = [row for path in paths for row in read_record(path) if row.case.endswith(size)]
    numbers = {(row.case, row.precision, row.contender): f"{getattr(row, value):.0f}" for row in rows}
    contenders = dict.fromkeys(row.contender for row in rows)
    lines = [
        f"| {value.replace('_', ' ')} | precision | {' | '.join(contenders)} |",
        f"|{'---|' * (len(contenders) + 2)}",
    ]
    for case, precision in dict.fromkeys((row.case, row.precision) for row in rows):
        cells = (numbers.get((case, precision, contender), "") for contender in contenders)
        lines.append(f"| {case} | {precision} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_chart(paths: Sequence[Path], output: Path) -> None:
    """Draw how many times as fast ours is as the original, by kind of work, processor and precision."""
    from matplotlib.figure import Figure

    shown = (FORWARD, STEP, PADDED, DETR)
    figure = Figure(figsize=(8.5, 2.8), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True)
    for work, panel in zip(shown, panels, strict=True):
        for row, path in enumerate(paths):
            rows = read_record(path)
            (case,) = {row.case for row in rows if work.holds(row.case)}
            for precision, offset, color in zip(PRECISIONS, (-0.2, 0.2), ("#0072B2", "#E69F00"), strict=True):
                ratio = speed_ratio(rows, case, precision)
                if ratio is None:
                    panel.text(1.2, row + offset, f"{precision} not measured", va="center", fontsize=7, color="grey")
                    continue
                panel.barh(row + offset, ratio, height=0.36, color=color, label=precision)
                panel.text(ratio + 0.1, row + offset, f"{ratio:.1f}", va="center", fontsize=8)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(work.name, fontsize=9)
        panel.set_yticks(range(len(paths)), [PROCESSORS[path.stem.rpartition("-")[2]] for path in paths], fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(xlim=(0, 9), ylim=(len(paths) - 0.5, -0.5))
    handles, labels = panels[0].get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle("Times as fast as the original in the same precision: ResNet-50, 800 x 1088", fontsize=10)
    figure.savefig(output)


def _ratios(rows: Sequence[Row], work: Work, precision: str) -> str:
    """Return the ratio of a kind of work, from the smallest to the largest of its cases, or nothing without cases."""
    cases = dict.fromkeys(row.case for row in rows if work.holds(row.case))
    ratios = sorted(ratio for case in cases if (ratio := speed_ratio(rows, case, precision)) is not None)
    return " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (ratios[:1] + ratios[-1:])))


if __name__ == "__main__":
    tables = (
        milliseconds_table(FOLDER / "table-zen5.md"),
        summary_table(summarised()),
        *(contenders_table(paths, "images_per_second") for paths in on_a_gpu()),
        contenders_table(engines()),
        contenders_table(engines(), size=" 1 x 800 x 1088"),
    )
    print(*tables, sep="\n\n")
    draw_chart(
        [path for path in reversed(summarised()) if path.stem.startswith("table-")],
        FOLDER.parent / "docs" / "speed.jpg",
    )
