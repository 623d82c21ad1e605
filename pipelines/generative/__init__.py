"""Runs of graphical models: trained on data, or distilled from another one without any."""
