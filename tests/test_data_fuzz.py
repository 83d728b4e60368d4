"""Random damage to annotation files and pictures ends in one of our errors or in success, never in a crash or a hang.

What is damaged runs in another process, whose memory and time are limited; run by hand, this file is that process:
python tests/test_data_fuzz.py annotations 0 100.
"""

import copy
import io
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_backbone.coco.annotations import load_annotations
from detr_backbone.coco.check import check_split
from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.coco.findings import DataPolicies
from detr_backbone.coco.images import read_image
from detr_backbone.coco.segmentations import decoded_counts
from detr_backbone.errors import DetrBackboneError

COMPRESSED = "T3d0X6"  # the runs 100, 20, 200
MEMORY = 2 * 2**30  # bytes beyond those of the imports
SECONDS = 20  # for one input
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 4, 9, 0.5, -0.0, 1e9, -1e9, 1e308, 1e400, float("nan"), 2**31, 2**32, 2**63),
    *(-(2**63), 10**400, "", "4", "NaN", "a.png", "../x", "\0", "\ud800", "é" * 300, [], [[]], [[[]]], {}, {"id": 1}),
    *({"size": [16, 20]}, [1, 2, 3, 4], [1, 2, 3, "4"], [[1, 2, 3, 4, 5, 6]], [[float("nan")] * 6], [[1e9] * 6]),
    *({"size": [16, 20], "counts": [0, 3]}, {"size": [16, 20], "counts": [320]}, {"size": [16, 20], "counts": ""}),
    *({"size": [200_000, 200_000], "counts": [40_000_000_000]}, {"size": [16, 20], "counts": [2**32 + 320, 0]}),
)  # fmt: skip
OURS = DataPolicies(
    **dict.fromkeys(DataPolicies.__dataclass_fields__, "drop") | {"box_partly_outside": "clamp"}  # type: ignore[arg-type]
)


def base() -> dict[str, Any]:
    masks = [
        [[2, 2, 12, 2, 12, 8], [1.5, 1.5, 3, 9, 7, 4]],
        {"size": [16, 20], "counts": [100, 20, 200]},
        {"size": [16, 20], "counts": COMPRESSED},
    ]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 16} for i in (4, 9)],
        "categories": [{"id": 3, "name": "dog"}, {"id": 79, "name": "cat"}],
        "annotations": [
            {"id": n, "image_id": 4, "category_id": 79, "bbox": [2, 2, 9, 6], "iscrowd": 0, "segmentation": s}
            for n, s in enumerate(masks)
        ],
    }  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key or index of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def counts(rng: random.Random) -> dict[str, Any]:
    """A run-length encoding that is nearly one."""
    height, width = rng.choice([(16, 20), (20, 16), (16, 21), (1, 320)])
    if rng.random() < 0.5:
        return {
            "size": [height, width],
            "counts": "".join(chr(rng.randrange(46, 114)) for _ in range(rng.randrange(12))),
        }
    runs = [rng.randrange(100) for _ in range(rng.randrange(8))]
    return {"size": [height, width], "counts": [*runs, 320 - sum(runs)]}


def annotations(rng: random.Random, folder: Path) -> None:
    """Load one damaged annotation file in every way."""
    content = base()
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        container, key = rng.choice(places(content))
        damage = rng.randrange(5)
        if damage == 0:
            del container[key]
        elif damage == 1 and isinstance(container, list):
            container.insert(key, container[key])
        elif damage == 2:
            container[key] = counts(rng)
        elif damage == 3:
            container[key] = [
                [
                    rng.choice([rng.uniform(-90, 90), copy.deepcopy(rng.choice(VALUES))])
                    for _ in range(rng.randrange(14))
                ]
            ]
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(content).replace(
        COMPRESSED, "".join(chr(rng.randrange(46, 114)) for _ in range(rng.randrange(9)))
    )
    if rng.random() < 0.1:
        place = rng.randrange(len(text))
        text = (
            text[:place] + rng.choice(["", "}", "[" * 5000, "\\", '"', "NaN", "\0"]) + text[place + rng.randrange(3) :]
        )
    path = folder / "x.json"
    path.write_text(text)
    check_split(folder, path, decode=False, num_queries=1)
    policies = rng.choice([DataPolicies(), OURS])
    packed = load_annotations(path, segmentations=True, policies=policies).segmentations
    assert packed is not None
    for index in range(len(packed)):
        encoded = packed[index]
        assert sum(decoded_counts(encoded["counts"].decode()) or []) == encoded["size"][0] * encoded["size"][1]
    CocoDetection(folder, path, policies=policies)[0]


def pictures(rng: random.Random, folder: Path) -> None:
    """Read one damaged picture."""
    values = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    mode, name = rng.choice(
        [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("P", "GIF"),
         ("RGBA", "WEBP"), ("RGB", "BMP"), ("RGB", "PPM"), ("RGB", "TIFF"), ("1", "TIFF"), ("RGB", "JPEG2000")]
    )  # fmt: skip
    picture = Image.fromarray(values)
    picture = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(10)
    buffer = io.BytesIO()
    picture.save(buffer, name, **({"exif": exif} if name in ("JPEG", "PNG", "WEBP") else {}))
    data = bytearray(buffer.getvalue())
    for _ in range(rng.choice([0, 1, 1, 4, 16])):
        place = rng.randrange(min(len(data), rng.choice([64, len(data)])))
        data[place] = rng.choice([data[place] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255])
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    if rng.random() < 0.1:
        data = data + data
    path = folder / f"x.{rng.choice(['png', 'jpg', name.lower(), 'eps'])}"
    path.write_bytes(data)
    try:
        read = read_image(path, size=rng.choice([None, (9, 13), (13, 9)]))
    finally:
        path.unlink()
    assert read.mode == "RGB"
    read.getpixel((0, 0))


def limited(name: str, seed: int, count: int) -> None:
    """Run inputs within the limits, and print how many were accepted and how many were refused."""
    warnings.simplefilter("error")
    run: Callable[[random.Random, Path], None] = {"annotations": annotations, "pictures": pictures}[name]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for image in (4, 9):
            Image.new("RGB", (20, 16)).save(Path(folder) / f"{image}.png")
        for number in range(seed, seed + count):
            signal.alarm(SECONDS)  # ends the process
            try:
                run(random.Random(number), Path(folder))
                outcomes["accepted"] += 1
            except DetrBackboneError:
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"{name} {number}") from error
    print(json.dumps(outcomes))


def outcomes_of(name: str, seed: int, count: int, timeout: int) -> dict[str, int]:
    command = [sys.executable, __file__, name, str(seed), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr
    outcomes: dict[str, int] = json.loads(result.stdout)
    return outcomes


@pytest.mark.parametrize(("name", "count"), [("annotations", 400), ("pictures", 400)])
def test_damage_ends_in_an_error_of_ours_or_in_success(name: str, count: int) -> None:
    outcomes = outcomes_of(name, 0, count, timeout=600)

    assert sum(outcomes.values()) == count
    assert min(outcomes["accepted"], outcomes["refused"]) > count / 20


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["annotations", "pictures"])
def test_more_damage_ends_so_too(name: str) -> None:
    assert sum(outcomes_of(name, 1_000_000, 2000, timeout=3600).values()) == 2000


if __name__ == "__main__":
    limited(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
