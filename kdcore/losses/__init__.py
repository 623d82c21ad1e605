"""LOSSES: the literal table of every loss that a configuration may name."""

from __future__ import annotations

from collections.abc import Mapping

from kdcore.losses.distributions import wasserstein
from kdcore.losses.features import mean_squared_error
from kdcore.losses.logits import cross_entropy, kd
from kdcore.losses.term import Features, Logits, Loss, Term

__all__ = ["LOSSES", "Features", "Logits", "Loss", "Term"]

LOSSES: Mapping[str, Loss] = {
    "ce": Logits(cross_entropy),
    "kd": Logits(kd),
    "mse": Features(mean_squared_error),
    "w2": Features(wasserstein, batch_level=True),
}
