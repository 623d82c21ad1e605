"""The mathematics of distillation in plain torch: networks' outputs in, losses out."""
