"""What an exported file says of itself, so that it can be loaded, and understood, without the code that made it."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detr_backbone.errors import ExportError
from detr_backbone.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine

KEY = "detr_backbone"
"""Under this key the metadata stand in a file, as JSON."""
VERSION = 1

Kind = Literal["backbone", "joiner", "detector"]


@dataclass(frozen=True, kw_only=True)
class ExportMetadata:
    """The metadata of an exported file.

    Attributes:
        kind: "backbone" gives feature levels, "joiner" levels and positions, "detector" logits and boxes.
        outputs: names of the graph's outputs, in order.
        masks: the graph takes `mask` [B, H, W], True on padding, beside `images` [B, C, H, W]; without it, it takes
            images of one size.
        padding: "exact" or "zeros", as the backbone was built.
        in_channels: C of the images.
        min_size: least (H, W) that the graph takes.
        strides, channels: of the backbone, one entry per level, finest first.
        position_encoding: of a joiner, what `position_encoding_from_dict` takes; else None.
        mean, std: what images are normalised with, of each channel; None where the exporter did not say.
        categories: id -> name, in the order of the labels; empty where the exporter did not say.
        config: the configuration that the model was built from; None where the exporter did not say.
        opset: of ONNX; None for other formats.
        versions: library -> version at the export.
        weights_sha256: of the model's state dict before the export, as `hash_of_weights` gives it.
        failed_engines: engine -> why it is not to run this file: what its outputs differ by.
        precision: "float32", or "int8" where weights and activations of most layers are.
        quantization: how int8 was calibrated, and what it costs; None for float32.
    """

    kind: Kind
    outputs: tuple[str, ...]
    masks: bool
    padding: Literal["exact", "zeros"]
    in_channels: int
    min_size: tuple[int, int]
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    position_encoding: Mapping[str, Any] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    categories: Mapping[int, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    opset: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    weights_sha256: str = ""
    failed_engines: Mapping[str, str] = field(default_factory=dict)
    precision: Literal["float32", "int8"] = "float32"
    quantization: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """Return the metadata as JSON."""
        return json.dumps({"version": VERSION, **asdict(self)})


def metadata_from_json(text: str, *, source: str) -> ExportMetadata:
    """Return the metadata that `ExportMetadata.to_json` wrote.

    Args:
        text: the JSON; empty where a file has none.
        source: names the file in an error.

    Raises:
        ExportError: there are none, or they are of another version of this package.
    """
    try:
        content = json.loads(text)
        version = content.pop("version")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ExportError(
            f"file has no metadata of this package | where: file={source} key={KEY} | got {text[:40]!r} expected JSON "
            "with a version | fix: export the model with detr_backbone.export"
        ) from error
    if version != VERSION:
        raise ExportError(
            f"metadata are of another version | where: file={source} key=version | got {version!r} expected {VERSION} "
            "| fix: export the model again"
        )
    try:
        content["categories"] = {int(key): name for key, name in content["categories"].items()}
        values: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        return ExportMetadata(**values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ExportError(
            f"metadata cannot be read | where: file={source} key={KEY} | got {error} | fix: export the model again"
        ) from error


def hash_of_weights(model: nn.Module) -> str:
    """Return the SHA-256 of a state dict: of its names, shapes, dtypes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def position_encoding_to_dict(encoding: nn.Module) -> dict[str, Any]:
    """Return what makes the same position encoding again, learned vectors included.

    Raises:
        ExportError: it is none of this package's.
    """
    if isinstance(encoding, PositionEmbeddingSine):
        options = ("num_pos_feats", "temperature", "normalize", "scale", "offset")
        return {"type": "sine", **{name: getattr(encoding, name) for name in options}}
    if isinstance(encoding, PositionEmbeddingLearned):
        tables = {"row_embed": encoding.row_embed.weight, "col_embed": encoding.col_embed.weight}
        shape = list(encoding.row_embed.weight.shape)
        return {"type": "learned", "shape": shape, **{name: _encode(table) for name, table in tables.items()}}
    raise ExportError(
        f"`model[1]` must be a PositionEmbeddingSine or a PositionEmbeddingLearned, got {type(encoding).__name__}; "
        "export `model[0]`, which gives the levels without positions"
    )


def position_encoding_from_dict(content: Mapping[str, Any]) -> PositionEmbeddingSine | PositionEmbeddingLearned:
    """Return the position encoding that `position_encoding_to_dict` described."""
    options = dict(content)
    if options.pop("type") == "sine":
        if not options["normalize"]:
            del options["scale"]
        return PositionEmbeddingSine(**options)
    num_embeddings, num_pos_feats = options["shape"]
    encoding = PositionEmbeddingLearned(num_pos_feats, num_embeddings=num_embeddings)
    for embedding, name in ((encoding.row_embed, "row_embed"), (encoding.col_embed, "col_embed")):
        embedding.weight = nn.Parameter(_decode(options[name], options["shape"]), requires_grad=False)
    return encoding


def _encode(table: Tensor) -> str:
    return base64.b64encode(table.detach().float().cpu().contiguous().numpy().tobytes()).decode()


def _decode(text: str, shape: list[int]) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32).view(*shape).clone()
