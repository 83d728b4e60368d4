"""Detections on pictures: python scripts/predict.py --checkpoint runs/shapes/checkpoint.pt --images data/shapes/val."""

import json
from pathlib import Path

import torch

from detr_backbone.coco.images import read_image
from detr_backbone.detectors import build_postprocess
from detr_backbone.errors import ConfigError
from detr_backbone.training import detector_of, load_checkpoint, parse_options, picture_files, plain_errors, predict


def main(*, checkpoint: str, images: str, output: str, threshold: float = 0.5, limit: int | None = None) -> None:
    """Write the detections on pictures as JSON and as annotated pictures.

    Args:
        checkpoint: the trained detector.
        images: a picture, or a folder of pictures.
        output: the folder for predictions.json and the annotated pictures, NAME.png for each picture NAME.
        threshold: detections with a lower score are left out, 0 to 1.
        limit: pictures to take, in the order of their names; all if left out.
    """
    from detr_backbone.visualize import draw_detections

    loaded = load_checkpoint(checkpoint)
    model, config = detector_of(loaded)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    postprocess = build_postprocess(config.detector, category_ids=loaded.category_ids)
    names = loaded.categories
    paths = picture_files(images)[:limit]
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() == paths[0].parent.resolve():
        raise ConfigError(f"--output must be another folder than that of the pictures, got {output}")
    predictions = []
    try:
        for path in paths:
            picture = read_image(path)
            (found,) = predict(model, postprocess, [picture], config.data.transforms)
            keep = found["scores"] >= threshold
            scores, labels, boxes = found["scores"][keep].tolist(), found["labels"][keep].tolist(), found["boxes"][keep]
            drawn = draw_detections(picture, boxes, [names[label] for label in labels], scores, labels)
            drawn.save(folder / f"{path.name}.png")
            for score, label, (x0, y0, x1, y1) in zip(scores, labels, boxes.tolist(), strict=True):
                predictions.append(
                    {
                        "file_name": path.name,
                        "category_id": label,
                        "category": names[label],
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "score": score,
                    }
                )
    finally:  # a picture that cannot be read ends the run, but not what was found before it
        (folder / "predictions.json").write_text(json.dumps(predictions, indent=1), encoding="utf-8")
    print(f"{len(predictions)} detections on {len(paths)} pictures: {folder}")


if __name__ == "__main__":
    with plain_errors():
        main(**parse_options(main))
