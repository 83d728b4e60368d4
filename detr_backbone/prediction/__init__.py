"""Using a trained detector: on files, pictures or arrays, with results in the forms that other programs read."""

from detr_backbone.prediction.formats import coco_results, prediction_records, to_supervision
from detr_backbone.prediction.image_files import ImageFiles, find_images, read_image_list
from detr_backbone.prediction.predictor import Prediction, Predictor, load_predictor

__all__ = [
    "ImageFiles",
    "Prediction",
    "Predictor",
    "coco_results",
    "find_images",
    "load_predictor",
    "prediction_records",
    "read_image_list",
    "to_supervision",
]
