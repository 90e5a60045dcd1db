"""Monitoring of a run: console progress, TensorBoard, profiles."""
