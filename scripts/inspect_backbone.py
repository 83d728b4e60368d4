"""`detr-backbone inspect`, from a checkout."""

import sys

from detr_backbone_cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
