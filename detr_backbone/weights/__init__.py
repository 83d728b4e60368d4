"""Pretrained weights: located by name, downloaded once, read without running code, loaded completely."""
