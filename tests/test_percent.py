"""Numbers that people read are in percent: those of a run, its curves, its table and what trackers get."""

import csv
from pathlib import Path

import pytest

from detr_backbone.training import load_checkpoint
from detr_backbone.training.progress import in_percent


def test_the_table_of_a_run_is_in_percent_and_empty_where_a_number_does_not_exist(tiny_run: Path) -> None:
    with (tiny_run / "run" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        (written,) = csv.DictReader(file)
    (row,) = load_checkpoint(tiny_run / "run" / "checkpoint.pt").rows

    numbers = [name for name in row if name.startswith(("AP", "AR"))]
    assert len(numbers) == 12
    for name in numbers:
        assert written[name] == ("" if row[name] < 0 else f"{100 * row[name]:.6g}")
    assert float(written["loss"]) == pytest.approx(row["loss"], rel=1e-5)  # six digits are written
    assert float(written["padding"]) == pytest.approx(row["padding"], rel=1e-5)


def test_what_trackers_get_is_in_percent() -> None:
    row = {"step": 7, "loss": 0.5, "AP": 0.25, "AR_100": 0.125, "AP_large": -1.0}

    assert in_percent(row) == {"step": 7, "loss": 0.5, "AP": 25, "AR_100": 12.5}
