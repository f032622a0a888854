"""Trackers record the metrics of a run: JSON lines, TensorBoard, Weights & Biases, MLflow, Trackio, and your own."""
