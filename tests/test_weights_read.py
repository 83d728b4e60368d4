"""Weights files as people have them are read as data; what is none is named in one line."""

import argparse
import json
import pathlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from detr_backbone import Backbone
from detr_backbone.errors import WeightsError
from detr_backbone.weights.load import load_weights
from detr_backbone.weights.read import file_sha256, read_weights

STATE = {"conv.weight": torch.arange(6.0).view(2, 3), "conv.bias": torch.ones(2)}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_read(path: Path, *, inside: str = "") -> None:
    file = read_weights(path)
    assert file.inside == inside
    assert file.tensors.keys() == STATE.keys()
    assert all(torch.equal(file.tensors[key], tensor) for key, tensor in STATE.items())


def behind(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in STATE.items()}


WRAPPED = {
    "": STATE,
    "model": {"model": STATE, "epoch": 3},
    "state_dict": {"state_dict": behind("module."), "pytorch-lightning_version": "2.0"},
    "ema.module": {"ema": {"module": STATE, "updates": 7}, "model": behind("other.")},
    "average": {"model": behind("other."), "average": behind("module.")},
    "teacher": {"student": behind("other."), "teacher": behind("module.")},
    "model_state_dict": {"model_state_dict": behind("_orig_mod."), "optimizer_state_dict": {"state": {}}},
    "module": {"module": behind("_fsdp_wrapped_module.") | {"n_averaged": torch.tensor(3)}},
}


@pytest.mark.parametrize("inside", WRAPPED)
def test_tensors_are_found_under_the_wrappers_of_every_trainer(tmp_path: Path, inside: str) -> None:
    assert_read(saved(tmp_path / "weights.pth", WRAPPED[inside]), inside=inside)


def test_a_wrapper_inside_of_a_name_is_taken_off(tmp_path: Path) -> None:
    state = {"backbone._orig_mod.conv.weight": torch.ones(1)}

    assert list(read_weights(saved(tmp_path / "weights.pth", state)).tensors) == ["backbone.conv.weight"]


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before torch 1.6"])
def test_what_published_files_hold_besides_tensors_is_let_in_and_dropped(tmp_path: Path, new_format: bool) -> None:
    args = argparse.Namespace(dilation=True, output_dir=pathlib.PosixPath("/runs"), lr=1e-4, betas=[0.9, 0.999])
    content = {
        "model": STATE,
        "args": args,
        "where": pathlib.PosixPath("/tmp"),
        "best": np.float64(0.42),
        "steps": np.int64(7),
        "small": np.float32(0.5),
    }
    path = saved(tmp_path / "weights.pth", content, _use_new_zipfile_serialization=new_format)

    assert_read(path, inside="model")
    assert read_weights(path).extras == {"args": {"dilation": True, "lr": 1e-4}}


def test_nothing_stays_allowed_after_the_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.pth", {"model": STATE, "args": argparse.Namespace()})
    before = set(torch.serialization.get_safe_globals())
    read_weights(path)

    assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace not in before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, new_format: bool) -> None:
    marker = tmp_path / "ran"
    content = {"model": STATE, "args": argparse.Namespace(evil=Evil(marker))}
    path = saved(tmp_path / "evil.pth", content, _use_new_zipfile_serialization=new_format)

    with pytest.raises(WeightsError, match="objects that would run code"):
        read_weights(path)
    assert not marker.exists()


def sharded(folder: Path) -> Path:
    """A folder as `save_pretrained` writes it where a model is large."""
    folder.mkdir()
    names = {key: f"model-0000{n}-of-00002.safetensors" for n, key in enumerate(STATE, start=1)}
    for key, name in names.items():
        save_file({key: STATE[key]}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_shards_are_read_together(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")

    assert_read(folder)
    assert_read(folder / "model.safetensors.index.json")


def test_a_changed_shard_changes_the_hash(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    before = read_weights(folder).sha256
    save_file({"conv.bias": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")

    assert read_weights(folder).sha256 != before


def test_a_folder_gives_safetensors_before_a_pickle(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    saved(tmp_path / "pytorch_model.bin", {"other": torch.ones(1)})

    assert_read(tmp_path)


def test_a_name_that_carries_the_right_hash_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.pth", STATE)

    assert_read(path.rename(tmp_path / f"weights-{file_sha256(path)[:8]}.pth"))


def test_a_date_in_a_name_is_no_hash(tmp_path: Path) -> None:
    assert_read(saved(tmp_path / "run-20240131.pth", STATE))


# A network of two layers of ResNet-18, and files that were altered in every way that people met.


@pytest.fixture(scope="module")
def body() -> torch.nn.Module:
    return Backbone("resnet18", return_layers=["layer1"], train_layers=[]).body


def altered(key: str, tensor: Tensor) -> Callable[[Path, dict[str, Tensor]], Path]:
    return lambda folder, state: saved(folder / "weights.pth", state | {key: tensor})


def file_of(name: str, content: bytes) -> Callable[[Path, dict[str, Tensor]], Path]:
    def write(folder: Path, _: dict[str, Tensor]) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def holding(content: Any) -> Callable[[Path, dict[str, Tensor]], Path]:
    return lambda folder, _: saved(folder / "weights.pth", content)


def flipped_bit(folder: Path, state: dict[str, Tensor]) -> Path:
    classifier = torch.arange(1000.0)
    path = saved(folder / "weights.pth", state | {"fc.bias": classifier})
    content = bytearray(path.read_bytes())
    content[content.index(classifier.numpy().tobytes()) + 1001] ^= 4
    path.write_bytes(content)
    return path


def cut(folder: Path, state: dict[str, Tensor]) -> Path:
    path = saved(folder / "weights.pth", state)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def cut_safetensors(folder: Path, state: dict[str, Tensor]) -> Path:
    path = folder / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def without(folder: Path, state: dict[str, Tensor]) -> Path:
    return saved(folder / "weights.pth", {key: state[key] for key in state if key != "layer1.1.bn2.bias"})


def twice(folder: Path, state: dict[str, Tensor]) -> Path:
    return saved(folder / "weights.pth", state | {f"ema.module.{key}": tensor for key, tensor in state.items()})


def deeper(folder: Path, state: dict[str, Tensor]) -> Path:
    more = {key.replace("layer1.1", "layer1.2"): tensor for key, tensor in state.items() if "layer1.1" in key}
    return saved(folder / "weights.pth", state | more)


def bottlenecks(folder: Path, state: dict[str, Tensor]) -> Path:
    return saved(folder / "weights.pth", state | {"layer1.0.conv1.weight": torch.ones(64, 64, 1, 1)})


def lost_shard(folder: Path, _: dict[str, Tensor]) -> Path:
    (sharded(folder / "model") / "model-00002-of-00002.safetensors").unlink()
    return folder / "model"


def poor_shard(folder: Path, _: dict[str, Tensor]) -> Path:
    save_file({"other": torch.ones(1)}, sharded(folder / "model") / "model-00002-of-00002.safetensors")
    return folder / "model"


def index(text: str) -> Callable[[Path, dict[str, Tensor]], Path]:
    return file_of("model.safetensors.index.json", text.encode())


NAN, BIG = torch.full((64,), torch.nan), torch.full((64,), 1e9).half()
ALTERED: dict[str, tuple[Callable[[Path, dict[str, Tensor]], Path], str]] = {
    "missing": (lambda folder, _: folder / "nowhere.pth", r"does not exist \| where: file=.*nowhere\.pth"),
    "empty": (file_of("weights.pth", b""), "an empty file"),
    "zeros": (file_of("weights.pth", bytes(4096)), "zeros"),
    "html": (file_of("weights.pth", b"\n<!DOCTYPE html><html></html>"), "a web page"),
    "lfs": (file_of("weights.pth", b"version https://git-lfs.github.com/spec/v1\noid x"), "Git LFS pointer"),
    "text": (file_of("weights.pth", b"hello"), "damaged file"),
    "bytes": (file_of("weights.pth", bytes(range(1, 256))), "got bytes that torch.save does not write"),
    "text as safetensors": (file_of("weights.safetensors", b"hello, hello"), "a damaged or cut file"),
    "cut": (cut, "without the end of the archive"),
    "cut safetensors": (cut_safetensors, "damaged file"),
    "flipped bit": (flipped_bit, "another CRC-32"),
    "hash of the name": (lambda folder, state: saved(folder / "w-0a1b2c3d.pth", state), "expected 0a1b2c3d"),
    "list": (holding([1, 2]), "must be a mapping .* got list"),
    "no tensors": (holding({"epoch": 1}), r"holds no tensors .* got keys \['epoch'\]"),
    "code": (holding({"model": Evil(Path("ran"))}), "got pathlib.*Path.touch|got builtins.getattr|would run code"),
    "an unknown class": (holding({"model": STATE, "x": pathlib.PurePath}), "would run code"),
    "empty folder": (lambda folder, _: folder, "folder holds no weights"),
    "lost shard": (lost_shard, "shard is missing .* expected model-00002-of-00002.safetensors"),
    "poor shard": (poor_shard, "shards lack 1 tensors .* key=conv.bias"),
    "broken index": (index("{"), "index cannot be read"),
    "index without a map": (index("{}"), "index cannot be read"),
    "index that leads elsewhere": (index('{"weight_map": {"a": "../secret.safetensors"}}'), "shard is missing"),
    "lacks a tensor": (without, r"lack 1 of 25 tensors .* key=layer1\.1\.bn2\.bias"),
    "another network": (holding(STATE), "lack 25 of 25 tensors .* got keys such as 'conv.weight'"),
    "twice": (twice, r"hold the network once .* got it under \['', 'ema\.module\.'\]"),
    "deeper network": (deeper, r"another network .* key=layer1\.2\.conv1\.weight .* in layer1\.2"),
    "bottlenecks": (bottlenecks, r"another shape .* key=layer1\.0\.conv1\.weight \| got \[64, 64, 1, 1\] expected"),
    "shape": (altered("bn1.bias", torch.zeros(3)), r"another shape .* key=bn1\.bias \| got \[3\] expected \[64\]"),
    "nan": (altered("bn1.bias", NAN), r"must be finite .* key=bn1\.bias"),
    "overflow of float16": (altered("bn1.bias", BIG), r"must be finite .* key=bn1\.bias"),
    "variance": (
        altered("bn1.running_var", -torch.ones(64)),
        r"must not be negative .* key=bn1\.running_var \| got -1",
    ),
    "int8": (altered("bn1.bias", torch.ones(64, dtype=torch.int8)), r"another dtype .* got torch\.int8"),
    "complex": (altered("bn1.bias", torch.ones(64) * 1j), r"another dtype .* got torch\.complex64"),
    "bool": (altered("bn1.bias", torch.ones(64) > 0), r"another dtype .* got torch\.bool"),
    "float8": (altered("bn1.bias", torch.ones(64).to(torch.float8_e4m3fn)), r"another dtype .* got torch\.float8"),
    "sparse": (altered("bn1.bias", torch.eye(64)[0].to_sparse()), "must be dense"),
    "meta": (altered("bn1.bias", torch.zeros(64, device="meta")), "must be dense tensors .* on meta"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("fault", ALTERED)
def test_an_altered_file_gives_its_own_error_in_one_line_and_changes_nothing(
    body: torch.nn.Module, tmp_path: Path, fault: str
) -> None:
    make, message = ALTERED[fault]
    before = {key: tensor.clone() for key, tensor in body.state_dict().items()}
    path = make(tmp_path, before)
    with pytest.raises(WeightsError, match=message) as error:
        load_weights(body, str(path), name="resnet18")

    text = str(error.value)
    assert str(tmp_path) in text
    assert "\n" not in text
    assert "\x1b" not in text
    assert not re.search("weights_only|trust", text)
    assert all(torch.equal(tensor, before[key]) for key, tensor in body.state_dict().items())


def test_the_file_that_is_not_altered_loads(body: torch.nn.Module, tmp_path: Path) -> None:
    assert load_weights(body, str(saved(tmp_path / "weights.pth", body.state_dict())), name="resnet18").loaded == 25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_precision_load_as_float32(body: torch.nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in body.state_dict().items()}
    load_weights(body, str(saved(tmp_path / "weights.pth", state)), name="resnet18")

    loaded = body.state_dict()
    assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in state.items())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
