"""Moves batches to steps and numbers to MLflow; knows nothing of distillation itself."""
