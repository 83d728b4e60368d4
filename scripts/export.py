"""`detr-backbone export`, from a checkout."""

import sys

from detr_backbone_cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
