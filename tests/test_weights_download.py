"""Downloads from a server on this machine: slow, stalled, cut, refused, damaged, and asked for by four at once."""

import hashlib
import http.server
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from detr_backbone.errors import WeightsError
from detr_backbone.training import parse_config
from detr_backbone.weights import download as module
from detr_backbone.weights.download import download
from detr_backbone.weights.locate import locate_weights
from detr_backbone.weights.zoo import ZOO
from tests.processes import ROOT

CONTENT = bytes(range(256)) * 40
NAME = f"weights-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"
Handler = http.server.BaseHTTPRequestHandler
Answer = Callable[[Handler], None]


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every GET by `answer`: its URL, and the paths asked for so far."""
    asked: list[str] = []

    class Served(Handler):
        def do_GET(self) -> None:  # noqa: N802
            asked.append(self.path)
            answer(self)

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{NAME}", asked
        finally:
            server.shutdown()
            thread.join()


def begin(request: Handler, length: int = len(CONTENT)) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(length))
    request.end_headers()


def whole(request: Handler) -> None:
    begin(request)
    request.wfile.write(CONTENT)


def slow(request: Handler) -> None:
    begin(request)
    for start in range(0, len(CONTENT), 1024):
        request.wfile.write(CONTENT[start : start + 1024])
        request.wfile.flush()
        time.sleep(0.02)


def stalled(request: Handler) -> None:
    begin(request)
    request.wfile.write(CONTENT[:1000])
    request.wfile.flush()
    time.sleep(1)


def cut(request: Handler) -> None:
    begin(request)
    request.wfile.write(CONTENT[:1000])


def damaged(request: Handler) -> None:
    begin(request)
    request.wfile.write(CONTENT[::-1])


def page(request: Handler) -> None:
    begin(request, 6)
    request.wfile.write(b"<html>")


def status(code: int) -> Answer:
    return lambda request: request.send_error(code)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0)


def test_a_slow_server_is_waited_for(tmp_path: Path) -> None:
    with serving(slow) as (url, _):
        assert download(url, tmp_path, timeout=5).read_bytes() == CONTENT


def test_progress_is_shown_on_a_terminal_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(whole) as (url, _):
        download(url, tmp_path / "piped")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        download(url, tmp_path / "terminal")

    assert capsys.readouterr().err.endswith(f"\r{NAME}: 0.0 of 0.0 MB\n")


# what the server does, what the error says, how often it is asked
FAULTS = {
    "stalled": (stalled, "timed out", 3),
    "cut": (cut, "broke off after 1000 of 10240 bytes|IncompleteRead", 3),
    "missing": (status(404), "404", 1),
    "forbidden": (status(403), "403", 1),
    "broken": (status(500), "500", 3),
    "damaged": (damaged, r"SHA-256 .*… expected", 1),
    "a web page": (page, r"SHA-256 .*… expected", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_download_names_url_and_target_and_leaves_no_file(tmp_path: Path, fault: str) -> None:
    answer, message, times = FAULTS[fault]
    with serving(answer) as (url, asked), pytest.raises(WeightsError, match=message) as error:
        download(url, tmp_path, timeout=0.2)

    assert f"url={url}" in str(error.value)
    assert f"put it at {tmp_path / NAME}" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(asked) == times
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_without_a_network_the_url_and_the_target_are_named(tmp_path: Path) -> None:
    with serving(whole) as (url, _):
        pass
    with pytest.raises(WeightsError, match=f"url={url} .* fix: fetch the file by other means and put it at {tmp_path}"):
        download(url, tmp_path, timeout=0.2)


def test_a_connection_that_breaks_once_is_tried_again(tmp_path: Path) -> None:
    def first_cut(request: Handler) -> None:
        (cut if len(asked) == 1 else whole)(request)

    with serving(first_cut) as (url, asked):
        assert download(url, tmp_path).read_bytes() == CONTENT
    assert len(asked) == 2


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.partial").write_bytes(CONTENT + b"more")
    with serving(whole) as (url, _):
        assert download(url, tmp_path).read_bytes() == CONTENT


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_four_processes_at_once_download_once(tmp_path: Path) -> None:
    with serving(slow) as (url, asked):
        processes = [
            multiprocessing.get_context("fork").Process(target=download, args=(url, tmp_path)) for _ in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert len(asked) == 1


@pytest.mark.parametrize("url", ["http://example.org/w-0123abcd.pth", "ftp://example.org/w-0123abcd.pth"])
def test_weights_come_by_https(tmp_path: Path, url: str) -> None:
    with pytest.raises(WeightsError, match="must come by https"):
        download(url, tmp_path)


def test_a_name_of_the_zoo_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with serving(whole) as (url, _):
        monkeypatch.setitem(ZOO, "detr_r50", replace(ZOO["detr_r50"], url=url))
        located = locate_weights("detr_r50")

    assert located.path == tmp_path / "checkpoints" / NAME
    assert located.mean_std == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_file_that_only_a_person_can_fetch_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    target = tmp_path / "checkpoints" / "deformable_detr_r50.pth"
    with pytest.raises(WeightsError, match=f"url=https://drive.google.com/.* put it at {target}"):
        locate_weights("deformable_detr_r50")
    target.parent.mkdir()
    target.write_bytes(CONTENT)

    assert locate_weights("deformable_detr_r50").path == target


def test_every_published_file_says_where_it_is_and_has_its_recipe() -> None:
    for name, published in ZOO.items():
        config = parse_config(["--config", str(ROOT / "configs" / published.config), *published.options])
        backbone = config.detector.backbone

        assert (published.url is None) != (published.page == ""), name
        assert (backbone.name, backbone.dilation) == (published.network, published.dilation), name
        assert config.detector.name == ("deformable_detr" if name.startswith("deformable") else "detr")
        assert (config.detector.num_feature_levels == 1) == ("single_scale" in name), name
