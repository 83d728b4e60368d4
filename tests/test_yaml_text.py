"""Configuration files that would hang, or that say another number than they seem to."""

import time
from pathlib import Path

import pytest

from detr_backbone.errors import ConfigError
from detr_backbone.training import parse_config
from detr_backbone.training.yaml_text import MAX_CHARACTERS, refuse_misleading

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
FILES = [
    ("x: &a [*a]", ["file=", "line=1", "anchors", "got a"]),
    (LAUGHS, ["file=", "line=1", "anchors", "got a0"]),
    ("seed: 1\noptimizer:\n  <<: {lr: 1}\n  lr: &rate 1", ["line=4", "got rate"]),
    ("optimizer: {lr: null}", ["`optimizer.lr`", "null"]),
    ("detector:\n  backbone:", ["line=2", "detector.backbone"]),
    ("seed: 010", ["file=", "line=1", "got 010"]),
    ("\noptimizer: {epochs: 1:30}", ["line=2", "got 1:30"]),
    (f"seed: {'9' * 5000}", ["line=1", "5000 digits"]),
    ("optimizer: {epochs: 99999999999}", ["`optimizer.epochs`", "2147483647"]),
    ("data: {transforms: {scales: [99999999999]}}", ["`data.transforms.scales`", "2147483647"]),
    ("seed: 4294967296", ["`seed`", "4294967295", "4294967296"]),
    ("seed: " + "[" * 5000 + "]" * 5000, ["line=1", "nested"]),
    ("seed: " + "[" * 100_000, ["line=1", "nested"]),
    ("seed: 1 #" + "x" * MAX_CHARACTERS, ["file=", "too long"]),
    ("seed: caf\xe9", ["file=", "UTF-8"]),
]


@pytest.mark.parametrize(("text", "words"), FILES)
def test_a_file_that_hangs_or_misleads_is_one_error_within_a_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="latin-1")
    start = time.process_time()
    with pytest.raises(SystemExit) as end:
        parse_config(["--config", str(path)])

    assert time.process_time() - start < 1
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert message.count("error: ") == 1
    assert "Traceback" not in message


ARGUMENTS = [
    (["--optimizer.lr", "null"], ["`optimizer.lr`", "got null"]),
    (["--seed", "010"], ["key=seed", "got 010"]),
    (["--seed=1:30"], ["key=seed", "got 1:30"]),
    (["--seed", "4294967296"], ["`seed`", "4294967295"]),
    (["--seed", "9" * 5000], ["key=seed", "5000 digits"]),
    (["--optimizer", "{lr: &a [*a]}"], ["optimizer"]),
]


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS)
def test_an_argument_that_misleads_is_one_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config(arguments)

    assert end.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert message.count("error: ") == 1


def test_a_file_that_an_option_names_is_read_as_carefully(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("inner.yaml").write_text("lr: &a [*a]", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse_config(["--optimizer", "inner.yaml"])

    assert capsys.readouterr().err.startswith("error: `optimizer` ")


@pytest.mark.parametrize(
    "text", ["seed: '010'", "x: 1e-4", "x: 0.5", "x: 0", "x: -10", "x: a:30", "x: [1, 2.0]", ": :"]
)
def test_plain_numbers_and_quoted_texts_pass(text: str) -> None:
    refuse_misleading(text)


def test_the_largest_seed_is_taken() -> None:
    assert parse_config(["--seed", "4294967295"]).seed == 2**32 - 1


def test_an_error_names_the_file_and_the_line() -> None:
    with pytest.raises(ConfigError, match=r"file=a\.yaml line=2 \| got 07"):
        refuse_misleading("seed: 1\nx: 07", source="a.yaml")
