"""How well a classifier does: sums that add up over batches and workers, and rates made of them.

Own code rather than torchmetrics, whose import takes three seconds in every worker of every trial.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

BINS = 15


def tally(logits: Float[Tensor, "n k"], label: Int[Tensor, " n"]) -> Float[Tensor, "4 15"]:
    """Rows, right rows, confidence and negative log-likelihood, summed by bin of confidence.

    Float64 sums of two parts of a sample add up to those of the whole.
    """
    logits = logits.double()
    confidence, choice = logits.softmax(dim=1).max(dim=1)
    nll = F.cross_entropy(logits, label, reduction="none")
    values = torch.stack([torch.ones_like(nll), (choice == label).double(), confidence, nll])
    # bins are closed above: a confidence of 1 is in the last
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    return values.new_zeros(4, BINS).index_add(1, bins, values)


def rates(sums: Float[Tensor, "4 15"]) -> dict[str, float]:
    r"""Top-1 accuracy, mean negative log-likelihood (nats) and expected calibration error.

    .. math:: \frac1n \sum_b n_b \lvert \mathrm{accuracy}_b - \mathrm{confidence}_b \rvert

    Raises ValueError where no row was counted.

    Source: Guo et al. 2017, arXiv:1706.04599, equations 2 and 3, with 15 equal bins.
    """
    rows, right, confidence, nll = sums
    count = rows.sum()
    if not count:
        raise ValueError("there are no rows to evaluate")
    error = (right - confidence).abs().sum()
    values = {"top1": right.sum(), "calibration_error": error, "nll": nll.sum()}
    return {name: float(value / count) for name, value in values.items()}
