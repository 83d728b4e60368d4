"""Everything that decides a run, in one configuration: defaults, then YAML files, then `--key.sub value`."""

import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_loader

from detr_backbone.checkpoints.load import InitClasses
from detr_backbone.detectors import DetectorConfig
from detr_backbone.errors import ConfigError
from detr_backbone.training.config_errors import OneLineParser, keys_of, lines_of
from detr_backbone.training.data import DataConfig
from detr_backbone.training.optimizer import OptimizerConfig
from detr_backbone.training.recipes import find_recipe
from detr_backbone.training.yaml_text import load_yaml, read_text, refuse_misleading, refuse_misread_arguments

YAML = "yaml_text"  # the name under which jsonargparse knows `load_yaml`
MAX_INTEGER = 2**31 - 1
MAX_SEED = 2**32 - 1  # of NumPy


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: a detector, its data, its optimiser.

    Args:
        output_dir: the folder of checkpoints, metrics and resolved configuration.
        detector: the detector.
        init_from: start from a whole detector: a file, a published one such as detr_r50, or
            hf-hub:OWNER/NAME@REVISION. The detector must be the same but for its classes and queries.
        init_classes: its class head: new starts it anew; by_name copies the classes of equal name and starts the others
            anew; same keeps it whole, for the same classes in the same order.
        data: the data.
        optimizer: the optimiser.
        mixed_precision: "bf16" computes the detector under autocast.
        strategy: how several processes train one detector: ddp, each holds all of it; fsdp (FSDP2), each holds a part
            of every parameter, gradient and moment of the optimiser, for detectors that one device cannot hold.
        compile: compile the detector with torch.compile: minutes at the start, less time for every step after.
        calibration_images: training images from which a backbone without pretrained weights takes its frozen BatchNorm
            statistics before the first step; 0 leaves them at (0, 1).
        ema_decay: decay of an average of the weights that is evaluated in their place, such as 0.9998; 0 keeps none.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        early_stopping: evaluations without a better AP after which the run ends; 0 never ends it early.
        seed: of weights, order, transforms and dropout.
        resume: true continues from the newest checkpoint in `output_dir` that is whole; auto does so where there is
            one, and starts a run where there is none, as a job needs that may be stopped at any time.
        checkpoint_every: steps between checkpoints within an epoch; 0 for one at the end of each epoch only.
        checkpoint_minutes: the same in minutes.
        keep_checkpoints: newest checkpoints that are kept, besides that of the best AP.
        trackers: experiment trackers that get what `metrics.csv` gets: tensorboard, wandb, mlflow.
        log_every: seconds between lines where the output is no terminal.
        collective_timeout: seconds after which processes no longer wait for one that does not come.
        dry_run: take one batch through everything, say what the run would be, and end.
        overfit: train on that many images and evaluate on the same ones, to see whether anything is learnt at all.
        replay: a batch that a run saved because its numbers were not finite, to be computed once more.
    """

    output_dir: str = "runs/run"
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    init_from: str | None = None
    init_classes: InitClasses = "new"
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mixed_precision: Literal["no", "bf16"] = "no"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    calibration_images: int = 256
    ema_decay: float = 0.0
    eval_every: int = 1
    early_stopping: int = 0
    seed: int = 0
    resume: bool | Literal["auto"] = False
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0
    keep_checkpoints: int = 2
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    log_every: float = 60.0
    collective_timeout: int = 600
    dry_run: bool = False
    overfit: int = 0
    replay: str | None = None

    def __post_init__(self) -> None:
        least = {"eval_every": 1, "keep_checkpoints": 1, "collective_timeout": 1}
        least |= dict.fromkeys(("calibration_images", "early_stopping", "seed", "checkpoint_every", "overfit"), 0)
        least |= dict.fromkeys(("checkpoint_minutes", "log_every"), 0)
        for key, bound in least.items():
            if not bound <= getattr(self, key) < math.inf:
                raise ConfigError(f"`{key}` must be at least {bound}, got {getattr(self, key)}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"`ema_decay` must be at least 0 and below 1, got {self.ema_decay}")
        if self.strategy == "fsdp" and (self.ema_decay or self.compile):
            key = "ema_decay" if self.ema_decay else "compile"
            raise ConfigError(f"`{key}` must be left out with `strategy` fsdp, got {getattr(self, key)}")
        if self.seed > MAX_SEED:
            raise ConfigError(f"`seed` must be at most {MAX_SEED}, got {self.seed}")
        if self.detector.backbone.in_channels != 3:
            raise ConfigError(
                f"`detector.backbone.in_channels` must be 3 for image files, which are read as RGB, got "
                f"{self.detector.backbone.in_channels}"
            )


class _YamlFile(ActionConfigFile):
    """`--config F`, a file or the name of a recipe; refuses what misleads, unknown keys, and keys that stand twice."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            path = find_recipe(str(values))
            refuse_misleading(read_text(path), source=str(path))
            parser.lines |= {key: (path, line) for key, line in lines_of(path, parser.keys).items()}
            refuse_duplicate_keys(path)
        except ConfigError as error:
            parser.error(str(error))
        untyped: Any = super()
        untyped.__call__(parser, namespace, str(path), option_string)


def config_parser(description: str) -> OneLineParser:
    """A command line that takes `--config F` and every key of TrainConfig as `--key.sub value`; later ones win."""
    set_loader(YAML, load_yaml, exceptions=(yaml.YAMLError, ConfigError))
    parser = OneLineParser(description=description, keys=keys_of(TrainConfig) | {"config": str}, parser_mode=YAML)
    parser.add_argument(
        "--config", action=_YamlFile, help="YAML file, or the name of a recipe; several are read in order"
    )
    parser.add_class_arguments(TrainConfig, nested_key=None, fail_untyped=True)
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line asks for; what is wrong with it ends the program with one message."""
    parser = config_parser("Train a detector on a dataset in COCO format, and evaluate it.")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        refuse_misread_arguments(arguments)
    except ConfigError as error:
        parser.error(str(error))
    return config_of(parser, parser.parse_args(arguments))


def override_config(config: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """Return the configuration with the changes that words of a command line ask for.

    Raises:
        ConfigError: a key is unknown, or a value does not fit.
    """
    if not words:
        return config
    refuse_misread_arguments(words)
    parser = config_parser("")
    parser.exit_on_error = False
    parser.set_defaults(dict(flat(config_to_dict(config))))
    return config_of(parser, parser.parse_args(words))


def config_of(parser: ArgumentParser, parsed: Namespace) -> TrainConfig:
    """The configuration in what a `config_parser` parsed."""
    keys = TrainConfig.__dataclass_fields__
    try:
        refuse_empty_values(vars(parsed), TrainConfig)
        instantiated = parser.instantiate(parsed)
        config = TrainConfig(**{key: instantiated[key] for key in keys})
        refuse_huge_integers(config)
        return config
    except ConfigError as error:
        parser.error(str(error))


def refuse_empty_values(content: Mapping[str, Any], kind: Any, prefix: str = "") -> None:
    """Refuse null for an option that takes none; a YAML file reaches a dataclass with it, unchecked.

    Raises:
        ConfigError: naming the key.
    """
    for key, hint in get_type_hints(kind).items():
        value = content.get(key, ...)
        if value is None and type(None) not in get_args(hint):
            raise ConfigError(f"`{prefix}{key}` must have a value, got null")
        if is_dataclass(hint) and value is not ...:
            refuse_empty_values(value if isinstance(value, Mapping) else vars(value), hint, f"{prefix}{key}.")


def refuse_huge_integers(config: TrainConfig) -> None:
    """Refuse integers that no run can use, before they end in an error of memory or arithmetic.

    Raises:
        ConfigError: naming the key.
    """
    for key, value in flat(config_to_dict(config)):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > MAX_INTEGER and key != "seed":
                raise ConfigError(f"`{key}` must be at most {MAX_INTEGER}, got {number:.3g}")


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists, numbers and strings, to be written into files."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def save_config(config: TrainConfig, path: Path, *, remarks: Sequence[str] = ()) -> None:
    """Write the configuration as a YAML file that `--config` reads, in a folder that is made where it is missing.

    `remarks` stand above it as comments.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    comments = "".join(f"# {remark}\n" for remark in remarks)
    path.write_text(comments + yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")


def config_from_dict(content: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `config_to_dict` wrote.

    Raises:
        ConfigError: a key is unknown or a value does not fit.
    """
    parser = _saved_config_parser()
    try:
        return config_of(parser, parser.parse_object(dict(content)))
    except Exception as error:
        raise ConfigError(f"a saved configuration cannot be read: {error}") from error


@cache  # making it takes longer than what it parses
def _saved_config_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, nested_key=None)
    return parser


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts by their dotted keys, as the command line names them.

    >>> dict(flat({"seed": 0, "data": {"val": {"images": "x"}}}))
    {'seed': 0, 'data.val.images': 'x'}
    """
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def refuse_duplicate_keys(path: Path) -> None:
    """Refuse a YAML file in which a mapping has one key twice.

    Raises:
        ConfigError: naming file, line and key.
    """
    try:
        nodes = [yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    except yaml.YAMLError:
        return  # the parser that reads the file next says what is wrong with it
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            for (key, value), earlier in zip(node.value, range(len(keys)), strict=True):
                if key.value in keys[:earlier]:
                    raise ConfigError(
                        f"a key must stand once | where: file={path} line={key.start_mark.line + 1} key={key.value}"
                    )
                nodes.append(value)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
