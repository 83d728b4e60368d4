"""Weights load completely, from a file or the network, or loading is an error that says why."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from detr_backbone import Backbone
from detr_backbone.errors import WeightsError
from detr_backbone.weights.download import download
from detr_backbone.weights.load import load_weights
from detr_backbone.weights.zoo import ZOO

NETWORK = torchvision.models.resnet18()
STATE = NETWORK.state_dict()


@pytest.fixture
def saved(tmp_path: Path):
    def save(content: Any) -> str:
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        return str(path)

    return save


def assert_loaded(backbone: Backbone) -> None:
    for key, tensor in backbone.body.state_dict().items():
        assert torch.equal(tensor, STATE[key]), key


def test_weights_of_torchvision_load_from_a_file(saved) -> None:
    backbone = Backbone("resnet18", weights=saved(STATE))

    assert_loaded(backbone)
    assert backbone.weights is not None
    assert (backbone.weights.loaded, backbone.weights.left_out) == (100, ("fc.bias", "fc.weight"))
    assert backbone.weights.sha256 == hashlib.sha256(backbone.weights.source.read_bytes()).hexdigest()
    assert "loaded 100 tensors from" in str(backbone.weights)


@pytest.mark.parametrize("prefix", ["backbone.0.body.", "module.", "detr.backbone.0.body."])
@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_a_detectors_checkpoint_gives_its_backbone(saved, prefix: str, wrapper: str) -> None:
    state = {prefix + key: tensor for key, tensor in STATE.items()} | {"class_embed.weight": torch.ones(2)}

    assert_loaded(Backbone("resnet18", weights=saved({wrapper: state, "epoch": 3})))


def test_a_file_needs_no_ending(saved, tmp_path: Path) -> None:
    assert_loaded(Backbone("resnet18", weights=str(Path(saved(STATE)).rename(tmp_path / "weights"))))


def test_fewer_stages_take_fewer_tensors(saved) -> None:
    backbone = Backbone("resnet18", weights=saved(STATE), return_layers=["layer2"])

    assert_loaded(backbone)
    assert backbone.weights is not None
    assert "layer4.1" in backbone.weights.left_out


def test_a_deeper_network_is_refused_even_where_its_first_stages_fit(saved) -> None:
    deeper = STATE | {key.replace("layer3.1", "layer3.2"): t for key, t in STATE.items() if key.startswith("layer3.1")}
    with pytest.raises(WeightsError, match=r"another network .* key=layer3\.2\.conv1\.weight"):
        Backbone("resnet18", weights=saved(deeper), return_layers=["layer2"])


def test_a_published_detector_gives_its_backbone_by_name(saved, tmp_path: Path, monkeypatch) -> None:
    path = Path(saved({"model": {f"backbone.0.body.{key}": tensor for key, tensor in STATE.items()}}))
    name = f"detr-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    (tmp_path / "checkpoints").mkdir()
    path.rename(tmp_path / "checkpoints" / name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(ZOO, "detr_r50", replace(ZOO["detr_r50"], url=f"https://example.org/{name}"))
    backbone = Backbone("resnet18", weights="detr_r50")

    assert_loaded(backbone)
    assert backbone.weights is not None
    assert backbone.weights.inside == "model.backbone.0.body"


@pytest.mark.parametrize("name", ["IMAGENET1K_V3", "DEFAULT"])
def test_an_unknown_weights_name_says_what_exists(name: str) -> None:
    with pytest.raises(WeightsError, match=f"got '{name}', expected one of IMAGENET1K_V1"):
        Backbone("resnet18", weights=name)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on this machine, and the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()
        thread.join()


def serve(folder: Path, content: bytes, digest: str | None = None) -> str:
    name = f"resnet18-{digest or hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    return name


def test_a_torchvision_name_is_downloaded_checked_and_loaded(server, saved, tmp_path: Path, monkeypatch) -> None:
    url, folder = server
    name = serve(folder, Path(saved(STATE)).read_bytes())
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(weights, "_value_", replace(weights.value, url=f"{url}/{name}"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    assert_loaded(Backbone("resnet18", weights="IMAGENET1K_V1"))
    assert (tmp_path / "hub" / "checkpoints" / name).exists()


def test_a_file_that_is_there_is_not_downloaded_again(server, tmp_path: Path) -> None:
    url, folder = server
    name = serve(folder, b"weights")
    first = download(f"{url}/{name}", tmp_path / "cache")
    (folder / name).unlink()

    assert download(f"{url}/{name}", tmp_path / "cache") == first


def test_a_cached_file_that_was_damaged_is_refused(server, tmp_path: Path) -> None:
    url, folder = server
    name = serve(folder, b"weights")
    download(f"{url}/{name}", tmp_path / "cache").write_bytes(b"weightz")

    with pytest.raises(WeightsError, match=r"damaged .* fix: delete the file"):
        download(f"{url}/{name}", tmp_path / "cache")


def test_a_url_without_a_hash_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"NAME-HASH\.EXT"):
        download("https://example.org/resnet18.pth", tmp_path)


def test_safetensors_load(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(STATE, tmp_path / "weights.safetensors")
    backbone = Backbone("resnet18")
    load_weights(backbone.body, str(tmp_path / "weights.safetensors"), name="resnet18")

    assert_loaded(backbone)
