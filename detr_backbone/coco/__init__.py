"""COCO datasets: reading and checking them, transforming and drawing samples, evaluating detections."""
