"""Distillation without data: pictures invented from what a teacher knows."""
