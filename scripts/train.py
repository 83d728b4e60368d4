"""Train a detector: python scripts/train.py --config configs/shapes.yaml [--optimizer.epochs 5]."""

from detr_backbone.training import parse_config, plain_errors, train

if __name__ == "__main__":
    with plain_errors():
        train(parse_config())
