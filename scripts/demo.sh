#!/bin/sh
# The whole way, from nothing to pictures of detections: draws a dataset, trains a detector, evaluates it, uses it.
set -eu
cd "$(dirname "$0")/.."
python -m detr_backbone.coco.shapes data/shapes
python scripts/train.py --config configs/shapes.yaml "$@"
python scripts/evaluate.py --checkpoint runs/shapes/checkpoint.pt --output runs/shapes/evaluation
python scripts/predict.py --checkpoint runs/shapes/checkpoint.pt --images data/shapes/val --limit 12 --output runs/shapes/pictures
