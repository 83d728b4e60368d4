"""Description of the layers of a network: rows of numbers, and a table to read."""

import csv
import io
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from detr_backbone.padding.plan import Batching, describe_batching


@dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """One tensor that a layer gave; a layer that gives several, or is called several times, has several of these.

    Attributes:
        path: of the layer in `named_modules()`; "" is the network itself.
        type: class of the layer.
        call: 1 for the first call of the layer in a pass, and so on; 0 if it gave nothing: the forward never called it,
            or left it before it returned, as an IntermediateLayerGetter leaves a network.
        used: whether the pass called the layer, or took a parameter or buffer of it or of what is inside it.
        output: where the tensor stands in what the layer gave, such as `['0'].tensors`; "" if it is all of that.
        shape: of the tensor; None if there is none.
        dtype: of the tensor.
        channels: C of a map [B, C, h, w], or of one [B, h, w, C] if only those axes have a stride.
        stride: the whole number of pixels per cell for which h = ceil(H / stride) and w = ceil(W / stride); of several,
            a power of two. None where there is none, as for a single cell.
        parameters: numbers in the parameters of the layer and of all inside it; buffers, as of FrozenBatchNorm2d, are
            no parameters.
        trainable: those of them that require gradients.
        mean, std, min, max: of the finite values, std without Bessel's correction; None where there are none.
        zeros: fraction of values that are exactly zero.
        nan, inf: number of values that are NaN, and of infinite ones.
        milliseconds: of this call with all that is called inside it, median over the timed passes; with other layers
            asked for inside it, their hooks count too, and on an accelerator their waiting for the device.
        bytes: of the tensor's values. Not what the layer takes meanwhile, nor what autograd would keep.
    """

    path: str
    type: str
    call: int = 0
    used: bool = True
    output: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    channels: int | None = None
    stride: int | None = None
    parameters: int
    trainable: int
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    zeros: float | None = None
    nan: int = 0
    inf: int = 0
    milliseconds: float | None = None
    bytes: int | None = None

    @property
    def is_finite(self) -> bool:
        """True if no value is NaN or infinite."""
        return not (self.nan or self.inf)


@dataclass(frozen=True, kw_only=True)
class Description:
    """The layers of a network in the order in which a pass enters them, those that gave nothing last.

    `str()` is a table of text, which rich prints with colours.

    Attributes:
        rows: one for each tensor that a layer gave.
        input_shape: of the batch that went in, padding included.
        device: where it ran.
        parameters, trainable: of the whole network.
        milliseconds: of a whole pass, median over the timed passes, without the layers' hooks.
        batching, leak: how the backbone in the network runs images of several sizes, and why not as one masked batch;
            None where there is no backbone. What is described is one pass over the whole batch all the same.
    """

    rows: tuple[LayerDescription, ...]
    input_shape: tuple[int, ...]
    device: str
    parameters: int
    trainable: int
    milliseconds: float
    batching: Batching | None = None
    leak: str | None = None

    @property
    def non_finite(self) -> tuple[LayerDescription, ...]:
        """The rows with NaN or infinite values."""
        return tuple(row for row in self.rows if not row.is_finite)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, for JSON."""
        content = asdict(self)
        rows = [row | {"shape": row["shape"] and list(row["shape"])} for row in content.pop("rows")]
        return content | {"input_shape": list(self.input_shape), "rows": rows}

    def to_csv(self) -> str:
        """Return a line of names and a line for each row; what does not exist is left empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(LayerDescription)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()

    def __str__(self) -> str:
        return "\n".join([*self._summary(), *self._warning(), *self._table()])

    def __rich__(self) -> str:
        header, *lines = self._table()
        marked = [line if row.is_finite else f"[bold red]{line}[/]" for line, row in zip(lines, self.rows, strict=True)]
        warning = [f"[bold white on red]{line}[/]" for line in self._warning()]
        return "\n".join([*self._summary(), *warning, f"[bold]{header}[/]", *marked])

    def _summary(self) -> list[str]:
        dtypes = {row.dtype for row in self.rows if row.dtype}
        return [
            f"input {list(self.input_shape)} on {self.device}, outputs in {', '.join(sorted(dtypes)) or 'no dtype'}",
            f"{self.milliseconds:.1f} ms, {self.parameters:,} parameters, {self.trainable:,} of them trainable",
            *([] if self.batching is None else [describe_batching(self.batching, self.leak)]),
        ]

    def _warning(self) -> list[str]:
        bad = self.non_finite
        if not bad:
            return []
        innermost = (row for row in bad if not any(_is_inside(other, row) for other in bad))
        first = _label(next(innermost))
        return [f"NOT FINITE: NaN or infinity in {len(bad)} of {len(self.rows)} outputs, first in {first}"]

    def _table(self) -> list[str]:
        """Return a line of names and a line for each row; columns in which no row has anything are left out."""
        cells = [list(_HEADER)]
        for before, row in pairwise((None, *self.rows)):
            assert row is not None
            cells.append(
                _cells(row, same_call=before is not None and before.path == row.path and before.call == row.call)
            )
        one_dtype = len({row.dtype for row in self.rows if row.dtype}) == 1
        columns = [c for c in zip(*cells, strict=True) if any(c[1:]) and not (c[0] == "dtype" and one_dtype)]
        widths = [max(map(len, column)) for column in columns]
        return [
            "  ".join(
                cell.ljust(width) if name in _LEFT else cell.rjust(width)
                for cell, width, (name, *_) in zip(line, widths, columns, strict=True)
            ).rstrip()
            for line in zip(*columns, strict=True)
        ]


_HEADER = (
    *("layer", "type", "output", "shape", "stride", "dtype", "params", "trains"),
    *("mean", "std", "min", "max", "zeros", "NaN/Inf", "ms", "memory"),
)
_LEFT = ("layer", "type", "output", "shape", "dtype", "trains")


def _cells(row: LayerDescription, *, same_call: bool) -> list[str]:
    """Return the texts of a row of the table; what belongs to the call is said once, at its first tensor."""
    trains = {0: "frozen", row.parameters: "yes"}.get(row.trainable, "partly")
    return [
        *(["", ""] if same_call else [_label(row), row.type]),
        row.output if row.call else "used, not called" if row.used else "not called",
        "" if row.shape is None else str(list(row.shape)),
        "" if row.stride is None else str(row.stride),
        row.dtype or "",
        *([f"{row.parameters:,}", trains] if row.parameters and row.call < 2 and not same_call else ["", ""]),
        *("" if number is None else f"{number:.3g}" for number in (row.mean, row.std, row.min, row.max)),
        "" if row.zeros is None else f"{row.zeros:.1%}",
        "" if row.is_finite else f"{row.nan} / {row.inf}",
        "" if same_call or row.milliseconds is None else f"{row.milliseconds:.2f}",
        "" if row.bytes is None else _memory(row.bytes),
    ]


def _label(row: LayerDescription) -> str:
    return (row.path or "(network)") + (f" (call {row.call})" if row.call > 1 else "")


def _is_inside(row: LayerDescription, outer: LayerDescription) -> bool:
    return row.path != outer.path and f"{row.path}.".startswith(f"{outer.path}." if outer.path else "")


def _memory(size: int) -> str:
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
