"""Priors on what the teacher says of an invented picture. All are minimised."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.checks import check_same_shape


def class_cross_entropy(
    teacher: Float[Tensor, "b k"], target: Int[Tensor, " b"]
) -> Float[Tensor, ""]:
    r"""How unlikely the teacher finds the class that each picture is meant to show.

    .. math:: -\frac1B \sum_b \log \mathrm{softmax}(t_b)_{y_b}

    Source: Yin and others 2020 (DeepInversion), arXiv:1912.08795, equation 1.
    """
    return F.cross_entropy(teacher, target)


def soft_cross_entropy(
    teacher: Float[Tensor, "b k"], target: Float[Tensor, "b k"], *, temperature: float = 20.0
) -> Float[Tensor, ""]:
    r"""Cross-entropy of the teacher's softened prediction under a drawn one.

    .. math:: -\frac1B \sum_{bk} y_{bk} \log \mathrm{softmax}(t_b / \tau)_k

    No factor :math:`\tau^2`: it would only scale the learning rate of pictures.

    Source: Nayak and others 2019 (ZSKD), arXiv:1905.08114, equation 4.
    """
    check_same_shape(teacher, target)
    return -(target * F.log_softmax(teacher / temperature, dim=1)).sum(dim=1).mean()


def soft_divergence(
    teacher: Float[Tensor, "b k"], target: Float[Tensor, "b k"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence from the teacher's softened prediction to a drawn one.

    .. math:: \frac1B \sum_b \mathrm{KL}\big( y_b \,\|\, \mathrm{softmax}(t_b / \tau) \big)

    A class that was drawn with probability 0 adds nothing.

    Source: Wang 2021, Data-free knowledge distillation with soft targeted transfer set synthesis,
    arXiv:2104.04868, who does not say at which temperature.
    """
    check_same_shape(teacher, target)
    return F.kl_div(F.log_softmax(teacher / temperature, dim=1), target, reduction="batchmean")


def one_hot(teacher: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    r"""Cross-entropy of the teacher's prediction against its own choice.

    .. math:: -\frac1B \sum_b \max_k \log \mathrm{softmax}(t_b)_k

    Source: Chen and others 2019 (DAFL), arXiv:1904.01186, equation 3.
    """
    return -F.log_softmax(teacher, dim=1).amax(dim=1).mean()


def entropy(teacher: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    r"""Mean entropy of the teacher's predictions, in nats: how undecided it is.

    .. math:: \frac1B \sum_b H(\mathrm{softmax}(t_b))

    Source: Choi and others 2020 (DFQ), arXiv:2005.04136, equation 7, second term.
    """
    log_p = F.log_softmax(teacher, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def class_imbalance(teacher: Float[Tensor, "b k"], *, base: float = math.e) -> Float[Tensor, ""]:
    r"""Minus the entropy of the batch's mean prediction: least where all classes are as frequent.

    .. math:: \sum_k \bar p_k \log_a \bar p_k, \quad \bar p = \frac1B \sum_b \mathrm{softmax}(t_b)

    The logarithm of the mean is taken of logarithms, so that a class that nobody predicts adds 0.

    Source: Chen and others 2019 (DAFL), arXiv:1904.01186, equation 5 ("information entropy"); their
    code has base 10. Of DFQ (equation 7, third term) the sign is this one: a printed plus would
    minimise balance.
    """
    log_mean = F.log_softmax(teacher, dim=1).logsumexp(dim=0) - math.log(len(teacher))
    return (log_mean.exp() * log_mean).sum() / math.log(base)


def class_shares(teacher: Float[Tensor, "b k"]) -> Float[Tensor, " k"]:
    """The share of rows for which the teacher chooses each class: a collapse shows here first."""
    counts = torch.bincount(teacher.argmax(dim=1), minlength=teacher.shape[1])
    return counts / len(teacher)
