"""Time and memory of loading a file of the size of COCO: python benchmarks/annotations.py --output /tmp/index.json."""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from detr_backbone.coco.annotations import CocoAnnotations, load_annotations
from detr_backbone.commands.command_line import Command


class Boxes(Dataset[float]):
    """The annotations of each image as a detection dataset reads them, without the image file."""

    def __init__(self, annotations: CocoAnnotations) -> None:
        self.annotations = annotations
        self.ends = np.searchsorted(annotations.image_index, np.arange(len(self) + 1))

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def __getitem__(self, index: int) -> float:
        mine = slice(self.ends[index], self.ends[index + 1])
        return float(self.annotations.boxes[mine].sum()) + len(str(self.annotations.file_names[index]))


def main(
    *, output: str, images: int = 117_266, annotations: int = 860_001, segmentations: bool = False, workers: int = 0
) -> None:
    """Load an annotation file of the size of COCO's instances_train2017, which is written if missing.

    Args:
        output: the annotation file.
        images: images of a file that is written.
        annotations: annotations of a file that is written.
        segmentations: load the segmentations too.
        workers: processes that read two epochs of boxes, and whose memory is measured then; 0 leaves that out.
    """
    path = Path(output)
    if not path.exists():
        write(path, images, annotations)
    start, spent = time.perf_counter(), time.process_time()
    loaded = load_annotations(path, segmentations=segmentations)
    seconds, spent = time.perf_counter() - start, time.process_time() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{path.stat().st_size / 1e6:.0f} MB, {len(loaded.image_ids)} images, {len(loaded.boxes)} annotations")
    print(f"loaded in {seconds:.1f} s, of which {spent:.1f} s on the processor, peak memory {peak:.2f} GiB")
    for count in (1, workers) if workers else ():
        print(f"{count} workers after two epochs: {unique_memory(loaded, count) / 2**20:.0f} MiB proportional memory")


def unique_memory(annotations: CocoAnnotations, workers: int) -> int:
    """Return bytes of this process and its workers after two epochs, a shared page counted once (PSS)."""
    loader = DataLoader(Boxes(annotations), batch_size=256, num_workers=workers, persistent_workers=True, shuffle=True)
    for _ in range(2):
        for _ in loader:
            pass
    task = Path("/proc/self/task")
    children = [pid for thread in task.iterdir() for pid in (thread / "children").read_text().split()]
    return sum(_proportional(pid) for pid in ["self", *children])


def _proportional(pid: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def write(path: Path, images: int, annotations: int) -> None:
    """Write a file with the keys, digits and outline lengths of COCO's instances, and random values."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        file.write('{"info": {"description": "random numbers in the form of COCO 2017"},"licenses": [],"images": [')
        for number in range(images):
            name = f"{5 * number + 9:012d}.jpg"
            url = f"http://images.cocodataset.org/train2017/{name}"
            record = {"license": 3, "file_name": name, "coco_url": url, "height": 480, "width": 640}
            extra = {"date_captured": "2013-11-14 16:28:13", "flickr_url": url, "id": 5 * number + 9}
            file.write(("," if number else "") + json.dumps(record | extra, separators=(",", ": ")))
        file.write('],"annotations": [')
        points = rng.gamma(1.4, 16.0, annotations).astype(int) + 3
        for number in range(annotations):
            x, y, w, h = rng.uniform(0, [500, 350, 140, 130]).round(2).tolist()
            outline = ",".join(
                map(str, (rng.uniform(size=(points[number], 2)) * [w, h] + [x, y]).round(2).ravel().tolist())
            )
            image, category = 5 * int(rng.integers(images)) + 9, int(rng.integers(1, 91))
            file.write(
                f'{"," if number else ""}{{"segmentation": [[{outline}]],"area": {w * h * 0.6},"iscrowd": 0,'
                f'"image_id": {image},"bbox": [{x},{y},{w},{h}],"category_id": {category},"id": {number + 1}}}'
            )
        file.write('],"categories": [')
        file.write(",".join(json.dumps({"supercategory": "any", "id": i, "name": f"class {i}"}) for i in range(1, 91)))
        file.write("]}")


if __name__ == "__main__":
    EXAMPLE = "python benchmarks/annotations.py --output /tmp/index.json"
    sys.exit(Command(name="python benchmarks/annotations.py", main=main, example=EXAMPLE).run(sys.argv[1:]))
