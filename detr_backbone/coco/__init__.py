"""COCO datasets: reading and checking them, transforming them, drawing samples."""
