"""Defaults, then YAML files, then the command line; what does not fit is named."""

from pathlib import Path

import pytest
import yaml

from detr_backbone.errors import ConfigError
from detr_backbone.training import TrainConfig, config_from_dict, config_to_dict, parse_config
from detr_backbone.training.config import refuse_duplicate_keys

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(written) -> None:
    config = parse_config(
        ["--config", written("optimizer: {lr: 2e-4, epochs: 7}\nseed: 3"), "--optimizer.epochs", "9", "--seed=4"]
    )

    assert (config.optimizer.lr, config.optimizer.epochs, config.seed) == (2e-4, 9, 4)
    assert config.optimizer.weight_decay == TrainConfig().optimizer.weight_decay


@pytest.mark.parametrize("number", ["1e-4", "1e-04", "0.0001"])
def test_a_small_number_is_a_number(written, number: str) -> None:
    assert parse_config(["--config", written(f"optimizer: {{lr: {number}}}")]).optimizer.lr == 1e-4


BAD = [
    ("optimizer: {lr: abc}", ["optimizer.lr", "abc", "a number", "line=1"]),
    ("optimizer: {learning_rate: 1}", ["learning_rate"]),
    ("lr_backbon: 1", ["lr_backbon"]),
    ("detector: {name: yolo}", ["detector.name", "yolo", "deformable_detr"]),
    ("detector: {backbone: {padding: reflect}}", ["padding", "reflect", "exact"]),
    ("detector: {two_stage: true}", ["two_stage", "deformable_detr"]),
    ("data: {batch_size: 0}", ["batch_size", "at least 1"]),
    ("data: {val: {subset: {count: 5, share: 0.5}}}", ["subset.count", "subset.share", "exclude each other"]),
    ("data: {val: {subset: {cuont: 5}}}", ["data.val.subset", "cuont"]),
    ("optimizer: {epochs: 0}", ["optimizer.epochs", "positive"]),
    ("optimizer: {lr: .nan}", ["optimizer.lr", "positive", "nan"]),
    ("optimizer: {weight_decay: -1}", ["optimizer.weight_decay", "negative"]),
    ("seed: -1", ["seed", "at least 0"]),
    ("eval_every: 0", ["eval_every", "at least 1"]),
    ("seed: 1\nseed: 2", ["key=seed", "line=2", "stand once"]),
    ("data: {batch_size: 1, batch_size: 2}", ["key=batch_size", "stand once"]),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_what_does_not_fit_is_named(written, capsys, text: str, words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--config", written(text)])

    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_a_file_that_holds_code_is_refused_and_its_code_is_not_run(written, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(SystemExit):
        parse_config(["--config", written(f"seed: !!python/object/apply:pathlib.Path.touch [{marker}]")])
    assert not marker.exists()


def test_an_abbreviated_option_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--see", "1"])
    assert "--see" in capsys.readouterr().err


def test_a_key_of_a_list_entry_stands_once_too(written) -> None:
    with pytest.raises(ConfigError, match="line=2 key=a"):
        refuse_duplicate_keys(Path(written("list:\n- {a: 1, a: 2}")))


def test_a_saved_configuration_reads_back_as_itself() -> None:
    subset = ["--data.val.subset.count", "5", "--data.val.subset.categories", "[cat, 3]"]
    config = parse_config(["--config", str(CONFIGS[0]), "--detector.num_classes", "7", *subset])
    text = yaml.safe_dump(config_to_dict(config))

    assert config_from_dict(yaml.safe_load(text)) == config


def test_a_saved_configuration_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="colour"):
        config_from_dict(config_to_dict(TrainConfig()) | {"colour": "red"})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_parses_and_says_where_it_comes_from(path: Path) -> None:
    config = parse_config(["--config", str(path)])
    header = path.read_text(encoding="utf-8")

    assert config.output_dir == f"runs/{path.stem}"
    for word in ("# Source", "# Data", "# Command", "# Time", f"configs/{path.name}"):
        assert word in header


def test_single_scale_is_one_line_away_from_multi_scale() -> None:
    multi, single = (
        [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(("#", "output_dir"))]
        for path in CONFIGS
        if path.stem.startswith("shapes")
    )

    assert len(multi) == len(single)
    assert [b.strip() for a, b in zip(multi, single, strict=True) if a != b] == ["return_layers: [layer3]"]
