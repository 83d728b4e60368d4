#!/bin/sh
# The whole way, from nothing to pictures of detections: draws a dataset, trains a detector, evaluates it, uses it.
set -eu
cd "$(dirname "$0")/.."
run=runs/shapes
python -m detr_backbone.coco.shapes data/shapes
python scripts/train.py --config configs/shapes.yaml
python scripts/evaluate.py --checkpoint $run/checkpoint.pt --output $run/evaluation
python scripts/predict.py --checkpoint $run/checkpoint.pt --images data/shapes/val --limit 12 --threshold 0.3 \
    --output $run/pictures
