"""From what a user calls weights to a file on this machine."""

from dataclasses import dataclass
from pathlib import Path

from detr_backbone.errors import ConfigError, WeightsError, unknown_name
from detr_backbone.networks.build import TIMM
from detr_backbone.networks.pretraining import pretraining_of
from detr_backbone.weights.download import cache_folder, download
from detr_backbone.weights.hub import PREFIX, hub_folder
from detr_backbone.weights.zoo import ZOO

IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of RGB in [0, 1]: what torchvision's classifiers, DETR and Deformable DETR are trained with."""
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Located:
    """A local file or folder of weights, and the mean and std of the images it was trained with, where known."""

    path: Path
    mean_std: MeanStd | None = None


def locate_weights(weights: str, *, name: str | None = None) -> Located:
    """Return the local file of some weights, downloading it where it has to be.

    Args:
        weights: a local file or folder; a name of `ZOO`, such as "detr_r50"; `hf-hub:OWNER/NAME@REVISION`; an https URL
            of a file NAME-HASH.EXT; for a network of torchvision one of its weights names, such as "IMAGENET1K_V1"; for
            one of timm "pretrained" or one of its tags, such as "a1_in1k", with @REVISION where it is to be pinned.
        name: the network, as `build_network` takes it; None where a whole detector is wanted.

    Raises:
        WeightsError: there is no such file or name, or the download failed.
        ConfigError: a library is missing that the name needs.
    """
    try:
        is_local = Path(weights).exists()
    except (OSError, ValueError) as error:  # no name of a file, such as one that is too long
        raise WeightsError(f"weights file cannot be opened | where: file={weights[:80]!r} | got {error}") from error
    if is_local:
        return Located(path=Path(weights))
    if weights in ZOO:
        return Located(path=_zoo_file(weights), mean_std=IMAGENET_MEAN_STD)
    if weights.startswith(PREFIX):
        return Located(path=hub_folder(weights.removeprefix(PREFIX)))
    if "://" in weights:
        return Located(path=download(weights, cache_folder()))
    if Path(weights).suffix or "/" in weights:
        raise WeightsError(
            f"weights file does not exist | where: file={weights} | fix: give the path of an existing file, or a name"
        )
    if name is None:
        expected = unknown_name(weights, ZOO)
        raise WeightsError(f"weights must be a file, {PREFIX}OWNER/NAME@REVISION or a name: {expected}")
    return _of_timm(name, weights) if name.startswith(TIMM) else _of_torchvision(name, weights)


def _zoo_file(name: str) -> Path:
    published = ZOO[name]
    if published.url is not None:
        return download(published.url, cache_folder())
    path = cache_folder() / f"{name}.pth"
    if not path.is_file():
        raise WeightsError(
            f"weights must be fetched by hand | where: url={published.page} | fix: download the file in a browser and "
            f"put it at {path}"
        )
    return path


def _of_torchvision(name: str, weights: str) -> Located:
    from torchvision.models import get_model_weights

    known = get_model_weights(name)
    names = [member.name for member in known]
    if weights not in names:
        raise WeightsError(
            f"`weights` of {name} must be a file or a torchvision name: {unknown_name(weights, names, also=ZOO)}"
        )
    return Located(path=download(known[weights].url, cache_folder()), mean_std=_mean_std(name, weights))


def _mean_std(name: str, weights: str | None = None) -> MeanStd | None:
    pretraining = pretraining_of(name, weights)
    return None if pretraining is None else (pretraining.mean, pretraining.std)


def _of_timm(name: str, weights: str) -> Located:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"{name} needs timm: pip install 'detr_backbone[timm]'") from error
    tag, _, revision = weights.partition("@")
    model = name.removeprefix(TIMM)
    architecture = model.partition(".")[0]
    try:
        config = timm.models.get_pretrained_cfg(model if tag == "pretrained" else f"{architecture}.{tag}")
    except RuntimeError:  # timm's way to say that there is no such tag
        config = None
    if config is None or not config.hf_hub_id:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise WeightsError(f"`weights` of {name} must be a file or timm's: {unknown_name(tag, ['pretrained', *tags])}")
    repository = config.hf_hub_id + (f"/{architecture}.{config.tag}" if config.hf_hub_id.endswith("/") else "")
    repository = repository.replace("//", "/")
    try:
        path = hub_folder(f"{repository}@{revision or 'main'}")
    except WeightsError as error:
        make = f"timm.create_model('{architecture}.{config.tag}', pretrained=True).state_dict()"
        raise WeightsError(f"{error}; where the hub can be reached: torch.save({make}, PATH)") from error
    return Located(path=path, mean_std=_mean_std(f"{TIMM}{architecture}.{config.tag}"))
