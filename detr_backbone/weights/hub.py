"""Weights from the Hugging Face hub: safetensors of a named revision, never a pickle."""

import re
from contextlib import suppress
from pathlib import Path

from detr_backbone.errors import ConfigError, WeightsError
from detr_backbone.weights.read import file_sha256, read_index

PREFIX = "hf-hub:"
"""Prefix of a repository on the hub: hf-hub:OWNER/NAME@REVISION."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def hub_folder(name: str) -> Path:
    """Return the local folder with the weights, and config.json where there is one, of a repository on the hub.

    The hub's own library downloads into its own cache, once for all processes, with its own time-out
    (HF_HUB_DOWNLOAD_TIMEOUT) and endpoint (HF_ENDPOINT).

    Args:
        name: `OWNER/NAME@REVISION`; a revision is a commit, a tag or a branch. Only a commit names the same weights for
            ever; the folder that is returned is named after the commit.

    Raises:
        ConfigError: `huggingface_hub` is not installed.
        WeightsError: no revision is named, the repository or a file of it cannot be downloaded, or it holds no
            safetensors.
    """
    try:
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ConfigError(f"{PREFIX}{name} needs huggingface_hub: pip install 'detr_backbone[hub]'") from error
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w./-]+)", name)
    if match is None:
        raise WeightsError(f"`weights` from the hub must be {PREFIX}OWNER/NAME@REVISION, got {PREFIX}{name}")
    repository, revision = match[1], match[2]
    try:
        path = _download(repository, revision, WEIGHTS)
    except EntryNotFoundError:
        path = _download_shards(repository, revision)
    with suppress(EntryNotFoundError):  # not every repository has one
        _download(repository, revision, "config.json")
    return path.parent


def _download_shards(repository: str, revision: str) -> Path:
    """Download an index and what it names, and return the index."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        index = _download(repository, revision, INDEX)
    except EntryNotFoundError as error:
        raise WeightsError(
            f"repository holds no safetensors | where: url={_url(repository, revision, WEIGHTS)} | "
            f"expected {WEIGHTS} or {INDEX}; a pickle is not taken from the network"
        ) from error
    for shard in read_index(index)[1]:
        if not re.fullmatch(r"[\w.-]+\.safetensors", str(shard)):
            url = _url(repository, revision, INDEX)
            raise WeightsError(f"index must name safetensors beside it | where: url={url} | got {shard!r}")
        try:
            _download(repository, revision, shard)
        except EntryNotFoundError as error:
            raise _failure(_url(repository, revision, shard), "no such file, though the index names it") from error
    return index


def _download(repository: str, revision: str, filename: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    url = _url(repository, revision, filename)
    try:
        path = Path(hf_hub_download(repository, filename, revision=revision))
    except LocalEntryNotFoundError as error:
        reason = _first_line(error.__cause__ or error)
        raise _failure(url, f"no copy in the hub's cache, and from the hub: {reason}") from error
    except EntryNotFoundError:
        raise
    except Exception as error:  # the hub's own errors, those of its HTTP library, and OSError
        raise _failure(url, _first_line(error)) from error
    # The cache names large files by their SHA-256; small ones by a hash of git.
    expected = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", expected) and file_sha256(path) != expected:
        raise WeightsError(f"weights file is damaged | where: file={path.resolve()} | fix: delete it and run again")
    return path


def _url(repository: str, revision: str, filename: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository, filename, revision=revision)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _failure(url: str, got: str) -> WeightsError:
    return WeightsError(
        f"weights cannot be downloaded | where: url={url} | got {got} | "
        "fix: fetch the file by other means, and give its path as `weights`"
    )
