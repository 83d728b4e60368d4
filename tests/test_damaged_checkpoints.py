"""A checkpoint that is cut off, empty, damaged or something else: one line that says how to go on, in every command."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.processes import Ended

Run = Callable[..., Ended]
COMMANDS = {
    "evaluate": "evaluate --checkpoint FILE",
    "predict": "predict --checkpoint FILE --images shapes/val --output lost",
    "inspect": "inspect --checkpoint FILE --output lost",
    "export": "export --checkpoint FILE --output lost.pt2",
    "convert-weights": "convert-weights --source FILE --resnet torchvision --output lost.pth",
    "fine-tuning": "train --config tiny.yaml --output_dir lost --init_from FILE",
    "weights of a backbone": "train --config tiny.yaml --output_dir lost --detector.backbone.weights FILE",
    "resuming": "train --config tiny.yaml --output_dir FOLDER --resume true",
    "replay": "train --config tiny.yaml --replay FILE",
}


def flipped(content: bytes) -> bytes:
    """One bit of a tensor changed, which torch.load does not see."""
    middle = content.index(b"/data/0") + 2000
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "cut off": (lambda content: content[: len(content) // 2], "without the end of the archive: a cut file"),
    "empty": (lambda _: b"", "an empty file"),
    "zeros": (lambda content: bytes(len(content)), "zeros"),
    "bit flipped": (flipped, "damaged bytes"),
    "web page": (lambda _: b"<html>sign in</html>", "a web page"),
    "words": (lambda _: b"nothing of the kind", ""),
    "missing": (lambda _: None, "file="),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_line_with_a_fix_in_every_command(
    command: Run, tiny_run: Path, tmp_path: Path, damage: str
) -> None:
    change, told = DAMAGE[damage]
    content = change((tiny_run / "run" / "checkpoint.pt").read_bytes())
    file = tmp_path / "checkpoint.pt"
    if content is not None:
        file.write_bytes(content)
    wrong = {}
    for name, line in COMMANDS.items():
        ended = command(tiny_run, *line.replace("FILE", str(file)).replace("FOLDER", str(tmp_path)).split())
        lines = ended.err.splitlines()
        if ended.code not in (1, 2) or not re.fullmatch(
            r"error: .*file=\S*checkpoint\.pt.* \| fix: .+", ended.err.strip()
        ):
            wrong[name] = f"{ended.code}: {ended.err}"
        elif told not in lines[0] and not (damage == "missing" or name == "resuming"):
            wrong[name] = lines[0]

    assert wrong == {}
    assert not list(tiny_run.glob("lost*/**/*.json"))


def test_a_file_of_another_program_is_no_checkpoint_and_says_what_is(
    command: Run, tiny_run: Path, tmp_path: Path
) -> None:
    torch.save({"images_per_step": 4}, tmp_path / "checkpoint.pt")
    for name in ("evaluate", "inspect", "resuming", "replay"):
        line = COMMANDS[name].replace("FILE", str(tmp_path / "checkpoint.pt")).replace("FOLDER", str(tmp_path))
        ended = command(tiny_run, *line.split())

        assert (ended.code, len(ended.err.splitlines())) == (1, 1)
        assert "fix: give a" in ended.err
