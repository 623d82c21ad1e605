"""Distillation of deep directed graphical models: one loss for every model that can be sampled."""
