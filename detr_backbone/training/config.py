"""Everything that decides a run, in one configuration: defaults, then YAML files, then `--key.sub value`."""

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from detr_backbone.checkpoints.load import InitClasses
from detr_backbone.coco.findings import DataPolicies
from detr_backbone.coco.selection import SubsetConfig
from detr_backbone.coco.transforms import TransformConfig
from detr_backbone.detectors import DetectorConfig
from detr_backbone.errors import ConfigError
from detr_backbone.evaluation.evaluator import Backend
from detr_backbone.training.config_errors import OneLineParser, keys_of, lines_of
from detr_backbone.training.recipes import find_recipe


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """One part of a dataset in COCO format.

    Args:
        images: the folder of the pictures.
        annotations: the JSON file.
        subset: which of its images; without any option, all of them.
    """

    images: str = ""
    annotations: str = ""
    subset: SubsetConfig = field(default_factory=SubsetConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and what is evaluated.

    Args:
        train: the training split.
        val: the split that is evaluated.
        policies: what is done about faults of the annotations that need not be refused.
        transforms: how pictures are resized, varied and normalised.
        batch_size: images per batch and process.
        pad_to_multiple_of: divides the sides of every batch; with `compile`, it bounds the number of sizes that are
            compiled.
        group_by_aspect_ratio: let images of similar shape share a batch in training, which leaves less padding but is
            not what the papers did. Evaluation always does so.
        num_workers: processes that read images; 0 reads them in the training process.
        timeout: seconds without a batch from the workers, as where storage stalls, that end a run; 0 waits for ever.
        eval_backend: what computes COCO's numbers: pycocotools, the reference, or this package's own matching, which
            gives the same to 1e-12 in a fraction of the time.
    """

    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    policies: DataPolicies = field(default_factory=DataPolicies)
    transforms: TransformConfig = field(default_factory=TransformConfig)
    batch_size: int = 2
    pad_to_multiple_of: int = 1
    group_by_aspect_ratio: bool = False
    num_workers: int = 2
    timeout: int = 0
    eval_backend: Backend = "pycocotools"

    def __post_init__(self) -> None:
        for key, least in (("batch_size", 1), ("num_workers", 0), ("pad_to_multiple_of", 1), ("timeout", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"`data.{key}` must be at least {least}, got {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; option names and defaults are those of DETR (arXiv 2005.12872, section A.4).

    Args:
        lr: learning rate outside the backbone.
        lr_backbone: learning rate of the backbone.
        lr_linear_proj_mult: factor on `lr` for sampling offsets and reference points; Deformable DETR publishes 0.1
            (arXiv 2010.04159, section 5).
        weight_decay: of every parameter.
        clip_max_norm: the gradient's norm is clipped to it; 0 does not clip.
        epochs: passes over the training data.
        warmup_steps: steps over which the learning rate rises from 0.
        schedule: "step" multiplies by 0.1 after `lr_drop` epochs; "cosine" falls to 0 over the whole run.
        lr_drop: epochs before the drop of "step".
    """

    lr: float = 1e-4
    lr_backbone: float = 1e-5
    lr_linear_proj_mult: float = 1.0
    weight_decay: float = 1e-4
    clip_max_norm: float = 0.1
    epochs: int = 300
    warmup_steps: int = 0
    schedule: Literal["step", "cosine"] = "step"
    lr_drop: int = 200

    def __post_init__(self) -> None:
        for key in ("lr", "epochs"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"`optimizer.{key}` must be positive, got {getattr(self, key)}")
        for key in ("lr_backbone", "lr_linear_proj_mult", "weight_decay", "clip_max_norm", "warmup_steps", "lr_drop"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"`optimizer.{key}` must not be negative, got {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: a detector, its data, its optimiser.

    Args:
        output_dir: the folder of checkpoints, log and resolved configuration.
        detector: the detector.
        init_from: start from a whole detector: a file, a published one such as detr_r50, or
            hf-hub:OWNER/NAME@REVISION. The detector must be the same but for its classes and queries.
        init_classes: its class head: new starts it anew; by_name copies the classes of equal name and starts the others
            anew; same keeps it whole, for the same classes in the same order.
        data: the data.
        optimizer: the optimiser.
        mixed_precision: "bf16" computes the detector under autocast.
        compile: compile the detector with torch.compile: minutes at the start, less time for every step after.
        calibration_images: training images from which a backbone without pretrained weights takes its frozen BatchNorm
            statistics before the first step; 0 leaves them at (0, 1).
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        seed: of weights, order and transforms.
        resume: continue from the checkpoint in `output_dir`.
    """

    output_dir: str = "runs/run"
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    init_from: str | None = None
    init_classes: InitClasses = "new"
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mixed_precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    calibration_images: int = 256
    eval_every: int = 1
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        for key, least in (("eval_every", 1), ("calibration_images", 0), ("seed", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"`{key}` must be at least {least}, got {getattr(self, key)}")
        if self.detector.backbone.in_channels != 3:
            raise ConfigError(
                f"`detector.backbone.in_channels` must be 3 for image files, which are read as RGB, got "
                f"{self.detector.backbone.in_channels}"
            )


class _YamlFile(ActionConfigFile):
    """`--config F`, a file or a recipe's name; refuses keys that do not exist or that stand twice, with their lines."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            path = find_recipe(str(values))
            parser.lines |= {key: (path, line) for key, line in lines_of(path, parser.keys).items()}
            refuse_duplicate_keys(path)
        except ConfigError as error:
            parser.error(str(error))
        untyped: Any = super()
        untyped.__call__(parser, namespace, str(path), option_string)


def config_parser(description: str) -> OneLineParser:
    """A command line that takes `--config F` and every key of TrainConfig as `--key.sub value`; later ones win."""
    parser = OneLineParser(description=description, keys=keys_of(TrainConfig) | {"config": str})
    parser.add_argument(
        "--config", action=_YamlFile, help="YAML file, or the name of a recipe; several are read in order"
    )
    parser.add_class_arguments(TrainConfig, nested_key=None, fail_untyped=True)
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line asks for; what is wrong with it ends the program with one message."""
    parser = config_parser("Train a detector on a dataset in COCO format, and evaluate it.")
    return config_of(parser, parser.parse_args(arguments))


def override_config(config: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """Return the configuration with the changes that words of a command line ask for.

    Raises:
        ConfigError: a key is unknown, or a value does not fit.
    """
    if not words:
        return config
    parser = config_parser("")
    parser.exit_on_error = False
    parser.set_defaults(dict(flat(config_to_dict(config))))
    return config_of(parser, parser.parse_args(words))


def config_of(parser: ArgumentParser, parsed: Namespace) -> TrainConfig:
    """The configuration in what a `config_parser` parsed."""
    keys = TrainConfig.__dataclass_fields__
    try:
        instantiated = parser.instantiate(parsed)
        return TrainConfig(**{key: instantiated[key] for key in keys})
    except ConfigError as error:
        parser.error(str(error))


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
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, nested_key=None)
    try:
        return config_of(parser, parser.parse_object(dict(content)))
    except Exception as error:
        raise ConfigError(f"a saved configuration cannot be read: {error}") from error


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
