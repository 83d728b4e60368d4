"""Weights of the Hugging Face hub, and modules saved as its mixin saves them, against an endpoint on this machine."""

import base64
import hashlib
import http.server
import importlib
import json
import multiprocessing
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from detr_backbone import Backbone, BackboneConfig
from detr_backbone.checkpoints.open import open_detector
from detr_backbone.checkpoints.pretrained import PretrainedBackbone, PretrainedDetector
from detr_backbone.detectors import DetectorConfig
from detr_backbone.errors import ConfigError, WeightsError
from detr_backbone.weights.hub import hub_folder
from detr_backbone.weights.locate import locate_weights
from detr_backbone.weights.read import read_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STATE = {"conv.weight": torch.arange(6.0)}


class Hub:
    """What the hub's own library asks for: files of repositories at revisions, and commits to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloads: list[str] = []
        self.committed: dict[str, bytes] = {}
        hub = self

        class Served(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def do_POST(self) -> None:
                hub.take(self)

            def log_message(self, *_: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, repository: str, name: str, content: bytes) -> None:
        path = self.folder / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        match = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", request.path)
        path = self.folder / match[1] / match[3] if match else None
        if match is None or path is None or not path.is_file() or match[2] not in ("main", "v1", COMMIT):
            code = "RevisionNotFound" if match and match[2] == "v2" else "EntryNotFound"
            request.send_response(404)
            request.send_header("X-Error-Code", code if match and path and path.parent.is_dir() else "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content = path.read_bytes()
        request.send_response(200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            self.downloads.append(path.name)
            request.wfile.write(content)

    def take(self, request: http.server.BaseHTTPRequestHandler) -> None:
        content = request.rfile.read(int(request.headers["Content-Length"]))
        answer: dict[str, Any] = {"url": f"{self.url}/owner/name", "id": "owner/name"}
        if "/preupload/" in request.path:
            files = json.loads(content)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in request.path:
            for line in map(json.loads, content.decode().splitlines()):
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{self.url}/owner/name/commit/{COMMIT}", "commitOid": COMMIT}
        body = json.dumps(answer).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(tmp_path / "served")
    thread = threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        served.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield served
    served.server.shutdown()
    thread.join()
    served.server.server_close()


def safetensors(folder: Path, state: dict[str, Tensor]) -> bytes:
    save_file(state, folder / "made.safetensors")
    return (folder / "made.safetensors").read_bytes()


def test_a_repository_gives_its_safetensors_and_config_at_a_commit(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/name", "model.safetensors", safetensors(tmp_path, STATE))
    hub.add("owner/name", "config.json", b"{}")
    hub.add("owner/name", "pytorch_model.bin", b"a pickle")
    located = locate_weights("hf-hub:owner/name@v1")

    assert located.path.name == COMMIT
    assert torch.equal(read_weights(located.path).tensors["conv.weight"], STATE["conv.weight"])
    assert sorted(hub.downloads) == ["config.json", "model.safetensors"]


def test_a_repository_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/name", "model.safetensors", safetensors(tmp_path, STATE))
    first = hub_folder("owner/name@v1")

    assert hub_folder(f"owner/name@{COMMIT}") == first
    assert hub.downloads == ["model.safetensors"]


def test_shards_are_downloaded_with_their_index(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/name", "model-1.safetensors", safetensors(tmp_path, STATE))
    index = {"weight_map": {"conv.weight": "model-1.safetensors"}}
    hub.add("owner/name", "model.safetensors.index.json", json.dumps(index).encode())

    assert read_weights(hub_folder("owner/name@main")).tensors.keys() == STATE.keys()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"conv.weight": "pytorch_model.bin"}}', r"must name safetensors .* got 'pytorch_model\.bin'"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"must name safetensors .* got '\.\./x\.safetensors'"),
        ('{"weight_map": {"a": "lost.safetensors"}}', r"url=.*/lost\.safetensors \| got no such file"),
        ("{}", "index cannot be read"),
    ],
)
def test_an_index_that_does_not_lead_to_safetensors_is_refused(hub: Hub, index: str, message: str) -> None:
    hub.add("owner/name", "model.safetensors.index.json", index.encode())
    hub.add("owner/name", "pytorch_model.bin", b"a pickle")
    with pytest.raises(WeightsError, match=message) as error:
        hub_folder("owner/name@main")

    assert "\n" not in str(error.value)
    assert hub.downloads == ["model.safetensors.index.json"]


def test_a_repository_of_pickles_is_refused(hub: Hub) -> None:
    hub.add("owner/name", "pytorch_model.bin", b"a pickle")
    with pytest.raises(WeightsError, match=r"holds no safetensors .* url=http://.*/owner/name/resolve/main/model"):
        hub_folder("owner/name@main")
    assert hub.downloads == []


@pytest.mark.parametrize("name", ["owner/name", "name@main", "owner/name@", "../x/y@main"])
def test_a_revision_has_to_be_named(name: str) -> None:
    with pytest.raises(WeightsError, match="must be hf-hub:OWNER/NAME@REVISION, got"):
        hub_folder(name)


@pytest.mark.parametrize("name", ["owner/other@main", "owner/name@v2"])
def test_what_the_hub_has_not_is_named_with_its_url(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.add("owner/name", "model.safetensors", safetensors(tmp_path, STATE))
    with pytest.raises(WeightsError, match=r"url=http://127.* fix: ") as error:
        hub_folder(name)
    assert "\n" not in str(error.value)


def test_a_hub_that_refuses_is_not_taken_for_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "answer", lambda request: request.send_error(403))
    with pytest.raises(WeightsError, match=r"cannot be downloaded .* from the hub: .*403") as error:
        hub_folder("owner/name@main")
    assert "\n" not in str(error.value)


def test_without_a_network_the_url_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"cannot be downloaded .* url=.*owner/name/resolve/main/model\.safetensors"):
        hub_folder("owner/name@main")


def test_a_file_that_changed_in_the_cache_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/name", "model.safetensors", safetensors(tmp_path, STATE))
    path = hub_folder("owner/name@main") / "model.safetensors"
    path.resolve().write_bytes(safetensors(tmp_path, {"conv.weight": torch.zeros(6)}))

    with pytest.raises(WeightsError, match=r"damaged .* fix: delete it"):
        hub_folder("owner/name@main")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_four_processes_at_once_download_once(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/name", "model.safetensors", safetensors(tmp_path, STATE))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=hub_folder, args=("owner/name@main",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0] * 4
    assert hub.downloads == ["model.safetensors"]


@pytest.mark.parametrize(("weights", "tag"), [("pretrained", "lamb_in1k"), ("lamb_in1k@v1", "lamb_in1k")])
def test_weights_of_timm_come_from_the_hub_with_hash_mean_and_std(
    hub: Hub, tmp_path: Path, weights: str, tag: str
) -> None:
    state = timm.create_model("mobilenetv3_small_050").state_dict()
    hub.add(f"timm/mobilenetv3_small_050.{tag}", "model.safetensors", safetensors(tmp_path, state))
    backbone = Backbone("timm/mobilenetv3_small_050", weights=weights, return_layers=["blocks.1"], padding="zeros")

    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.body.state_dict().items())
    report = backbone.weights
    assert report is not None
    assert report.sha256 == hashlib.sha256(report.source.read_bytes()).hexdigest()
    assert report.mean_std == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert report.sha256[:16] in str(report)


def test_without_the_hub_timm_weights_say_how_to_make_the_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"torch\.save\(timm\.create_model\('mobilenetv3_small_050\.lamb_in1k', pre"):
        locate_weights("pretrained", name="timm/mobilenetv3_small_050")


# Saved and built again

BACKBONE = BackboneConfig(name="resnet18", return_layers=("layer1",), train_layers=(), hidden_dim=32)
DETECTOR = DetectorConfig(
    backbone=BACKBONE, num_classes=2, num_queries=3, nheads=4, enc_layers=1, dec_layers=1, dim_feedforward=16
)


@pytest.fixture(scope="module")
def detector() -> PretrainedDetector:
    return PretrainedDetector(DETECTOR, ("cat", "dog"), (1, 5)).eval()


@torch.no_grad()
def test_a_saved_backbone_is_built_again(tmp_path: Path) -> None:
    backbone = PretrainedBackbone(BACKBONE).eval()
    backbone.save_pretrained(tmp_path)
    again = PretrainedBackbone.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 32, 48)

    assert again.config == BACKBONE
    assert torch.equal(again(images)[0][0].tensors, backbone(images)[0][0].tensors)


@torch.no_grad()
def test_a_saved_detector_is_built_again_with_its_categories(detector: PretrainedDetector, tmp_path: Path) -> None:
    detector.save_pretrained(tmp_path)
    again = PretrainedDetector.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 32, 48)

    assert (again.config, again.category_names, again.category_ids) == (DETECTOR, ("cat", "dog"), (1, 5))
    assert torch.equal(again(images)["pred_logits"], detector(images)["pred_logits"])


def test_its_folder_is_a_detectors_file_like_any_other(detector: PretrainedDetector, tmp_path: Path) -> None:
    detector.save_pretrained(tmp_path)
    opened = open_detector(str(tmp_path))

    assert opened.config == DETECTOR
    assert opened.categories == {1: "cat", 5: "dog"}
    assert opened.report.layout.names == "original"


def test_a_folder_of_another_backbone_is_refused(tmp_path: Path) -> None:
    PretrainedBackbone(BACKBONE).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"]["return_layers"] = ["layer2"]
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(WeightsError, match=r"another backbone .* key=0\.body\.layer2"):
        PretrainedBackbone.from_pretrained(tmp_path)


def test_a_repository_without_a_revision_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"`revision` must be a commit, a tag or a branch .* for owner/name"):
        PretrainedDetector.from_pretrained("owner/name")


def test_a_pushed_detector_comes_back_from_the_hub(hub: Hub, detector: PretrainedDetector) -> None:
    detector.push_to_hub("owner/name", token="hf_none")
    for name, content in hub.committed.items():
        hub.add("owner/name", name, content)
    again = PretrainedDetector.from_pretrained("owner/name", revision=COMMIT)

    assert {"model.safetensors", "config.json", "README.md"} <= hub.committed.keys()
    assert all(torch.equal(tensor, detector.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_a_pushed_backbone_comes_back_from_the_hub(hub: Hub) -> None:
    backbone = PretrainedBackbone(BACKBONE)
    backbone.push_to_hub("owner/name", token="hf_none")
    for name, content in hub.committed.items():
        hub.add("owner/name", name, content)
    again = PretrainedBackbone.from_pretrained("owner/name", revision=COMMIT)

    assert again.config == BACKBONE
    assert all(torch.equal(tensor, backbone.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_without_the_library_of_the_hub_saving_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "detr_backbone.checkpoints.pretrained")
    with pytest.raises(ConfigError, match=r"pretrained needs huggingface_hub: pip install 'detr_backbone\[hub\]'"):
        importlib.import_module("detr_backbone.checkpoints.pretrained")
