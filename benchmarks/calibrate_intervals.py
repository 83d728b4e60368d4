"""Coverage of the 95 % interval of a part for the number of the whole: python benchmarks/calibrate_intervals.py.

The dataset and its detector are simulated; the parts are drawn from it by chance, without replacement.
"""

import sys
from collections import Counter

import numpy as np

from detr_backbone.commands.command_line import Command
from detr_backbone.evaluation.average_precision import average_precision
from detr_backbone.evaluation.intervals import resample_intervals
from detr_backbone.evaluation.matching import match
from detr_backbone.evaluation.settings import COCO_SETTINGS
from detr_backbone.evaluation.simulation import simulate

SHOWN = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100")


def main(
    *, images: int = 40_000, part: int = 200, classes: int = 3, draws: int = 400, resamples: int = 200, seed: int = 0
) -> None:
    """Draw parts of a simulated dataset and count the intervals that cover the numbers of all of it.

    Args:
        images: of the whole dataset; so many that its own AP is hardly biased.
        part: images of each part.
        classes: of the dataset.
        draws: how many parts are drawn.
        resamples: halves of each part, for its interval.
        seed: of everything.
    """
    matches = match(*simulate(images, classes=classes, detections=30, seed=seed))
    whole = average_precision(matches)
    values = zip(COCO_SETTINGS.stat_names, whole.stats[:, 0].tolist(), strict=True)
    truth = {name: value for name, value in values if name in SHOWN}
    generator = np.random.default_rng(seed)
    covered, below = Counter[str](), Counter[str]()
    classes_covered, classes_asked = Counter[str](), Counter[str]()
    for draw in range(draws):
        drawn = matches.subset(generator.choice(matches.image_ids, part, replace=False).tolist())
        intervals = resample_intervals(drawn, resamples=resamples, seed=draw)
        for name, value in truth.items():
            one = intervals.stats[name]
            covered[name] += one.low <= value <= one.high
            below[name] += one.high < value
        for label, (one, value) in enumerate(zip(intervals.per_class.values(), whole.per_class[:, 0], strict=True)):
            images_with_class = len(np.unique(drawn.object_image_index[drawn.object_labels == label]))
            bucket = next(
                (f"{n} to {m - 1}" for n, m in ((2, 5), (5, 10), (10, 20), (20, 50)) if n <= images_with_class < m),
                "50 up",
            )
            if not np.isnan(one.low):
                classes_asked[bucket] += 1
                classes_covered[bucket] += one.low <= value <= one.high
    print(f"{draws} parts of {part} of {images} images, {classes} classes, {resamples} resamples")
    print("          whole  covered  above  below")
    for name, value in truth.items():
        fractions = [n / draws for n in (covered[name], draws - covered[name] - below[name], below[name])]
        print("{:<9} {:.3f} {:8.1%} {:6.1%} {:6.1%}".format(name, value, *fractions))
    print(f"AP of a class: covered {classes_covered.total() / classes_asked.total():.1%} of {classes_asked.total()}")
    for bucket, count in sorted(classes_asked.items(), key=lambda item: int(item[0].split()[0])):
        print(f"AP of a class in {bucket} images: covered {classes_covered[bucket] / count:.1%} of {count}")


if __name__ == "__main__":
    EXAMPLE = "python benchmarks/calibrate_intervals.py"
    sys.exit(Command(name="python benchmarks/calibrate_intervals.py", main=main, example=EXAMPLE).run(sys.argv[1:]))
