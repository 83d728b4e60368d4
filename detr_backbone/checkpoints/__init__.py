"""Whole detectors as they are published: read under their own names, opened, fine-tuned from, and written."""
