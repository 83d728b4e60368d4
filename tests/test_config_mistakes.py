"""A mistake in a configuration is one line with the key that was probably meant; lists may be typed in several ways."""

from pathlib import Path

import pytest

from detr_backbone.training import parse_config

FILES = {
    "a letter": (
        "detector:\n  num_querys: 3",
        "line=2 key=detector.num_querys | fix: did you mean detector.num_queries?",
    ),
    "without its group": ("lr: 3", "line=1 key=lr | fix: did you mean optimizer.lr?"),
    "a group": ("seed: 1\n\noptimiser: {lr: 1}", "line=3 key=optimiser | fix: did you mean optimizer?"),
    "nothing near": ("xyzzy: 1", "line=1 key=xyzzy | fix: --help-all lists every key"),
}
OPTIONS = {
    "--num_querys": "--detector.num_queries",
    "--detector.num_querys": "--detector.num_queries",
    "--lr": "--optimizer.lr",
    "--optimiser.lr": "--optimizer.lr",
}


def one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        parse_config(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


@pytest.mark.parametrize(("text", "told"), FILES.values(), ids=FILES)
def test_a_key_of_a_file_names_its_line_and_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")

    line = one_line(["--config", str(tmp_path / "mine.yaml")], capsys)

    assert line == f"error: key does not exist | where: file={tmp_path / 'mine.yaml'} {told}"


@pytest.mark.parametrize(("option", "meant"), OPTIONS.items(), ids=OPTIONS)
def test_an_option_names_the_nearest(capsys: pytest.CaptureFixture[str], option: str, meant: str) -> None:
    line = one_line([option, "3"], capsys)

    assert line == f"error: option does not exist | got {option} | fix: did you mean {meant}?"


@pytest.mark.parametrize("words", [["layer3", "layer4"], ["layer3,layer4"], ["[layer3, layer4]"], ["[layer3,layer4]"]])
def test_a_list_is_taken_as_people_type_it(words: list[str]) -> None:
    config = parse_config(["--detector.backbone.return_layers", *words, "--seed", "3"])

    assert config.detector.backbone.return_layers == ("layer3", "layer4")
    assert config.seed == 3
