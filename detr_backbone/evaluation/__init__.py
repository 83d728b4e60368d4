"""Judging detections: COCO's numbers, how sure they are, and what lies behind them."""
