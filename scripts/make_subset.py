"""`detr-backbone make-subset`, from a checkout."""

import sys

from detr_backbone_cli import main

if __name__ == "__main__":
    sys.exit(main(["make-subset", *sys.argv[1:]]))
