"""Files from the network: once for all processes, checked, with a time-out, and never left half written."""

import hashlib
import logging
import re
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch

from detr_backbone.errors import WeightsError
from detr_backbone.weights.read import file_sha256

logger = logging.getLogger(__name__)

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
ATTEMPTS = 3
PAUSE = 0.5
"""Seconds before the second attempt; before the third, twice that."""
CHUNK = 1 << 20
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def cache_folder() -> Path:
    """Return the folder of downloaded weights: torch.hub's, which the environment variable TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def download(url: str, folder: Path, *, timeout: float = TIMEOUT) -> Path:
    """Return the local copy of a weights file, downloading it once, checked on every use against its hash.

    Processes that ask for the same file at the same time wait for the one that downloads it; the file appears under
    its name only when it is complete and has its hash. A broken connection is tried again twice.

    Args:
        url: https, of a file named `NAME-HASH.EXT`, HASH being the first 8 or more hexadecimal digits of its SHA-256.
        folder: where the file is kept; one that is there already is not downloaded again.
        timeout: seconds without a byte after which a connection counts as broken.

    Raises:
        WeightsError: the file cannot be downloaded, or has another hash; the message has the URL and where to put it.
    """
    from filelock import FileLock

    path = folder / urlsplit(url).path.rsplit("/", 1)[-1]
    match = re.fullmatch(r".+-([0-9a-f]{8,64})\.\w+", path.name)
    if match is None:
        raise WeightsError(f"a weights file must be named NAME-HASH.EXT to be checked, got {url}")
    if urlsplit(url).scheme != "https" and urlsplit(url).hostname not in LOCAL_HOSTS:
        raise WeightsError(f"weights must come by https, got {url}")
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # released by the system where a process dies
                if not path.exists():
                    _fetch(url, path, match[1], timeout)
        except OSError as error:
            raise _failure(url, path, str(error)) from error
    sha256 = file_sha256(path)
    if not sha256.startswith(match[1]):
        raise WeightsError(
            f"weights file is damaged | where: file={path} | got SHA-256 {sha256} expected {match[1]}… | "
            "fix: delete the file and run again"
        )
    return path


def _fetch(url: str, path: Path, expected: str, timeout: float) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                sha256 = _stream(url, partial, timeout)
                break
            except (OSError, HTTPException) as error:
                final = False
                if isinstance(error, HTTPError):
                    error.close()  # it holds the connection
                    final = error.code < 500
                if final or attempt == ATTEMPTS:
                    raise _failure(url, path, str(error) or type(error).__name__) from error
                logger.warning("download of %s broke off (%s); trying again", url, error)
                time.sleep(PAUSE * attempt)
        if not sha256.startswith(expected):
            raise _failure(url, path, f"a file of SHA-256 {sha256[:16]}… expected {expected}…")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _stream(url: str, partial: Path, timeout: float) -> str:
    """Write what `url` gives into `partial` and return its SHA-256."""
    digest = hashlib.sha256()
    with urlopen(Request(url, headers={"User-Agent": "detr_backbone"}), timeout=timeout) as response:
        total = int(response.headers.get("Content-Length") or 0)
        logger.info("downloading %s (%.1f MB) to %s", url, total / 1e6, partial.parent)
        with partial.open("wb") as file:
            while chunk := response.read1(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                _show_progress(partial.stem, file.tell(), total)
            size = file.tell()
    if size < total:
        raise ConnectionError(f"the connection broke off after {size} of {total} bytes")
    return digest.hexdigest()


def _show_progress(name: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        of_total = f" of {total / 1e6:.1f}" if total else ""
        print(
            f"\r{name}: {done / 1e6:.1f}{of_total} MB", end="\n" if done == total else "", file=sys.stderr, flush=True
        )


def _failure(url: str, path: Path, got: str) -> WeightsError:
    return WeightsError(
        f"weights cannot be downloaded | where: url={url} | got {got} | "
        f"fix: fetch the file by other means and put it at {path}"
    )
