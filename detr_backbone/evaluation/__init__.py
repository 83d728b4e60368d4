"""Evaluation of detections: COCO's numbers, their confidence intervals, and an analysis of the mistakes."""
