"""A whole detector from a file of any known layout: strictly, or to fine-tune it on other classes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from detr_backbone.checkpoints.categories import class_names, matching_classes
from detr_backbone.checkpoints.detector_file import DECODER, HEADS, DetectorFile, read_detector
from detr_backbone.checkpoints.layouts import DetectorLayout, is_deformable
from detr_backbone.errors import WeightsError, unknown_name
from detr_backbone.weights.load import COUNTER, check_tensor
from detr_backbone.weights.locate import MeanStd

InitClasses = Literal["same", "new", "by_name"]
NOT_OF_THE_DETECTOR = ("criterion", "bbox_attention", "mask_head", "denoising")
"""Parts that files hold besides a detector and that are left out: losses, DETR's segmentation head, training aids."""
QUERIES = ("query_embed.weight", "transformer.tgt_embed.weight")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What of a file went into a detector, by part: part -> number of tensors.

    Attributes:
        source, sha256: the file.
        layout: whose names it uses.
        kept: tensors that the detector has from the file.
        resized: of these, those that the file had for another number of queries or classes; the rest of them is new.
        new: tensors that keep their random start.
        dropped: tensors of the file that the detector does not use.
        copied_classes: the names of the classes whose weights were copied; None where all classes were.
        mean_std: mean and std of the images that the weights were trained with, where known.
    """

    source: Path
    sha256: str
    layout: DetectorLayout
    kept: Mapping[str, int]
    resized: Mapping[str, int]
    new: Mapping[str, int]
    dropped: Mapping[str, int]
    copied_classes: tuple[str, ...] | None
    mean_std: MeanStd | None

    def __str__(self) -> str:
        lines = [f"weights of {self.source} (SHA-256 {self.sha256[:16]}…, {self.layout})"]
        for title, parts in (
            ("kept", self.kept),
            ("resized", self.resized),
            ("new", self.new),
            ("dropped", self.dropped),
        ):
            lines += [f"  {title:<8} {count:>4} tensors  {part}" for part, count in parts.items()]
        if self.copied_classes is not None:
            lines.append(f"  classes copied by name: {', '.join(self.copied_classes)}")
        return "\n".join(lines)

    def compare_images(self, mean: Sequence[float], std: Sequence[float]) -> str:
        """Return one line that compares the mean and std of our images with those that go with the weights."""
        ours = f"{list(mean)}, {list(std)}"
        if self.mean_std is None:
            return f"mean and std of the images: {ours}; those of the weights are not known from their file"
        theirs = f"{list(self.mean_std[0])}, {list(self.mean_std[1])}"
        if (tuple(mean), tuple(std)) == self.mean_std:
            return f"mean and std of the images: {ours}, as of the weights"
        return f"WARNING: mean and std of the images are {ours}, but those of the weights are {theirs}"


def load_detector(
    model: nn.Module,
    weights: str | DetectorFile,
    *,
    init_classes: InitClasses | None = None,
    category_names: Sequence[str] = (),
) -> LoadReport:
    """Load a whole detector, every tensor of it; nothing is changed where that is an error.

    Args:
        model: a DETR or DeformableDETR.
        weights: as `read_detector` takes it, or what it returned.
        init_classes: None for the same detector. To fine-tune: what becomes of the class head: "new" starts it anew,
            "by_name" copies the classes of equal name and starts the others anew, "same" keeps it whole. The number of
            queries may then differ: the first ones are kept, more are new.
        category_names: the name of each of the model's classes, for "by_name".

    Raises:
        WeightsError: a tensor is missing, left over, of another shape or dtype, or not finite; no class has an equal
            name, or nothing tells the names of the file's classes.
    """
    source = read_detector(weights) if isinstance(weights, str) else weights
    path = source.file.path
    own = model.state_dict()
    state = {key: tensor for key, tensor in source.state.items() if not key.endswith(COUNTER)}
    state |= _of_decoder(state, own)
    deformable = is_deformable(own)
    if deformable != is_deformable(state):
        kinds = ("DETR", "Deformable DETR")
        raise WeightsError(
            f"weights of another detector | where: file={path} | got {kinds[not deformable]} expected "
            f"{kinds[deformable]}"
        )
    resized: list[str] = []
    new: list[str] = []
    copied: tuple[str, ...] | None = None
    if init_classes is not None:
        if init_classes not in ("same", "new", "by_name"):
            raise WeightsError(f"`init_classes` must be: {unknown_name(init_classes, ('same', 'new', 'by_name'))}")
        heads = [key for key in own if _is_class_head(key)]
        if init_classes == "new":
            new += heads
        elif init_classes == "by_name":
            matches = _match_classes(source, category_names)
            copied = tuple(category_names[index] for index in matches)
            for key in heads:
                if key in state:
                    state[key] = _copy_rows(own[key], state[key], matches, background=not deformable)
            resized += heads
        # The embeddings of noised labels are a training aid with one row for each class.
        new += [key for key in own if key.startswith("denoising.") and (init_classes != "same" or key not in state)]
        for key in QUERIES:
            queries = _resize_queries(own[key], state[key]) if key in own and key in state else None
            if queries is not None:
                state[key] = queries
                resized.append(key)
    _check(path, own, state, new)
    model.load_state_dict({key: own[key] if key in new else state[key] for key in own})
    return LoadReport(
        source=path,
        sha256=source.file.sha256,
        layout=source.layout,
        kept=_count(key for key in own if key not in new),
        resized=_count(resized),
        new=_count(new),
        dropped=_count(key for key in state if key not in own or key in new),
        copied_classes=copied,
        mean_std=source.mean_std,
    )


def _check(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor], new: Sequence[str]) -> None:
    missing = [key for key in own if key not in state and key not in new]
    if missing:
        raise WeightsError(
            f"weights lack {len(missing)} of {len(own)} tensors | where: file={path} key={missing[0]} | "
            f"got none in {_parts(missing)}"
        )
    unexpected = [key for key in state if key not in own and key.partition(".")[0] not in NOT_OF_THE_DETECTOR]
    if unexpected:
        raise WeightsError(
            f"weights hold {len(unexpected)} tensors that the detector has not | where: file={path} "
            f"key={unexpected[0]} | got {_parts(unexpected)}"
        )
    for key, tensor in own.items():
        if key in new:
            continue
        if _is_class_head(key) and state[key].shape != tensor.shape:
            raise WeightsError(
                f"weights of other classes | where: file={path} key={key} | got {list(state[key].shape)} expected "
                f"{list(tensor.shape)} | fix: start from them with `init_classes`: new or by_name"
            )
        check_tensor(path, key, state[key], tensor)


def _of_decoder(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The heads that are the decoder's too in our detector, from a file that names them once."""
    names = {key: key.removeprefix(DECODER) for key in own if key not in state and key.startswith(DECODER)}
    return {key: state[name] for key, name in names.items() if name.startswith(HEADS) and name in state}


def _is_class_head(key: str) -> bool:
    return key.removeprefix(DECODER).startswith("class_embed.")


def _match_classes(source: DetectorFile, category_names: Sequence[str]) -> dict[int, int]:
    names = class_names(source.file, source.num_classes)
    if names is None:
        raise WeightsError(
            f"nothing tells the names of the file's {source.num_classes} classes | where: file={source.file.path} | "
            "fix: `init_classes`: new"
        )
    matches = matching_classes(names, category_names)
    if not matches:
        raise WeightsError(
            f"no class has a name of the file's | where: file={source.file.path} | got {list(category_names)[:10]} "
            f"expected some of {list(names)[:10]} | fix: `init_classes`: new"
        )
    return matches


def _copy_rows(own: Tensor, theirs: Tensor, matches: Mapping[int, int], *, background: bool) -> Tensor:
    """A class head of ours with the rows of matching classes, and of "no object", from theirs."""
    if own.shape[1:] != theirs.shape[1:]:
        return theirs  # of another width: the check names it
    rows = own.detach().clone()
    for mine, other in matches.items():
        rows[mine] = theirs[other]
    if background:
        rows[-1] = theirs[-1]
    return rows


def _resize_queries(own: Tensor, theirs: Tensor) -> Tensor | None:
    if own.shape == theirs.shape or own.shape[1:] != theirs.shape[1:]:
        return None
    count = min(len(own), len(theirs))
    return torch.cat([theirs[:count].to(own), own[count:].detach()])


def _count(keys: Iterable[str]) -> dict[str, int]:
    return dict(Counter(_part(key) for key in keys))


def _part(key: str) -> str:
    first, _, rest = key.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "transformer" else first


def _parts(keys: Iterable[str]) -> str:
    return ", ".join(f"{part} ({count})" for part, count in _count(keys).items())
