"""A trained backbone or detector as a file that other engines run, and such a file behind the same interface again."""

from detr_backbone.export.engines import ENGINES, EngineName, EnginePrecision
from detr_backbone.export.loading import ExportedBackbone, ExportedDetector, load_exported
from detr_backbone.export.metadata import ExportMetadata
from detr_backbone.export.quantization import quantize
from detr_backbone.export.writing import ExportReport, export

__all__ = [
    "ENGINES",
    "EngineName",
    "EnginePrecision",
    "ExportMetadata",
    "ExportReport",
    "ExportedBackbone",
    "ExportedDetector",
    "export",
    "load_exported",
    "quantize",
]
