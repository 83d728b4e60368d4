"""`detr-backbone export`, from a checkout."""

import sys

from detr_backbone.commands.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
