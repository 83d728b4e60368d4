"""A report on detections: one page that needs no network, and the same as data."""

from detr_backbone.report.content import summarise
from detr_backbone.report.origin import origin
from detr_backbone.report.write import write_report

__all__ = ["origin", "summarise", "write_report"]
