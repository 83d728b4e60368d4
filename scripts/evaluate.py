"""`detr-backbone evaluate`, from a checkout."""

import sys

from detr_backbone_cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
