"""`detr-backbone convert-weights`, from a checkout."""

import sys

from detr_backbone_cli import main

if __name__ == "__main__":
    sys.exit(main(["convert-weights", *sys.argv[1:]]))
