"""Priors that look for pictures on which student and teacher disagree. All are minimised.

None detaches either network: the synthesizer takes the gradient of the picture alone.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_shape
from kdcore.losses.logits import divergences, jensen_shannon

Reduction = Literal["batch", "entries"]


def disagreement(
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
    *,
    temperature: float = 1.0,
    reduction: Reduction = "batch",
) -> Float[Tensor, ""]:
    r"""Minus the divergence from the student's prediction to the teacher's.

    .. math:: -\frac{T^2}{B} \sum_b \mathrm{KL}\big( \mathrm{softmax}(t_b / T) \,\|\,
        \mathrm{softmax}(s_b / T) \big)

    and that divided by the number of classes where ``reduction`` is "entries". Both are taken of
    logarithms: the gradient of a probability that underflows would be NaN. There is no lower bound:
    clip the generator's gradient.

    Source: Micaelli & Storkey 2019 (ZSKT), arXiv:1905.09768, equation 1; their code divides by
    entries. Choi and others 2020 (DFQ), arXiv:2005.04136, equation 5, by the batch.
    """
    check_same_shape(student, teacher)
    per_row = divergences(student / temperature, teacher / temperature) * temperature**2
    return -per_row.mean() / (student.shape[1] if reduction == "entries" else 1)


def masked_disagreement(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    r"""Minus the divergence of the rows for which both choose the same class.

    .. math:: -\frac{T^2}{B} \sum_b [\arg\max s_b = \arg\max t_b] \,
        \mathrm{KL}\big( \mathrm{softmax}(t_b / T) \,\|\, \mathrm{softmax}(s_b / T) \big)

    Divided by all rows, not by those that agree; where none does it is 0, with gradient 0.

    Source: Fang and others 2021 (CMI), arXiv:2105.08584, and its code, which FastDFKD shares.
    """
    check_same_shape(student, teacher)
    agree = student.argmax(dim=1) == teacher.argmax(dim=1)
    per_row = divergences(student / temperature, teacher / temperature) * temperature**2
    return -(per_row * agree).mean()


def absolute_disagreement(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"]
) -> Float[Tensor, ""]:
    r"""Minus the mean absolute difference of the logits, whose gradient does not fade.

    .. math:: -\frac{1}{BK} \sum_{bk} |s_{bk} - t_{bk}|

    Source: Fang and others 2019 (DFAD), arXiv:1912.11006, equation 6.
    """
    check_same_shape(student, teacher)
    return -(student - teacher).abs().mean()


def competition(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, temperature: float = 3.0
) -> Float[Tensor, ""]:
    r"""One minus the Jensen-Shannon divergence of the softened predictions.

    .. math:: 1 - \mathrm{JS}\big( \mathrm{softmax}(t / T), \mathrm{softmax}(s / T) \big)

    In nats, so between 0.307 and 1.

    Source: Yin and others 2020 (Adaptive DeepInversion), arXiv:1912.08795, equation 8. Their code
    computes ``clamped_competition``.
    """
    return 1 - jensen_shannon(student, teacher, temperature=temperature)


def clamped_competition(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, temperature: float = 3.0
) -> Float[Tensor, ""]:
    r"""``competition`` as the published code has it: other divergences, of clamped numbers.

    .. math:: 1 - \tfrac12 \overline{\mathrm{KL}(m \| p)} - \tfrac12 \overline{\mathrm{KL}(m \| q)}

    with p, q and m = (p + q) / 2 clamped to [0.01, 0.99] each, and the whole to [0, 1]. What is
    clamped has no gradient, with a thousand classes nearly everything.

    Source: the code of Yin and others 2020, arXiv:1912.08795; for comparison only.
    """
    check_same_shape(student, teacher)
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (teacher, student))
    p, q, m = (held.clamp(0.01, 0.99) for held in (p, q, (p + q) / 2))
    both = (m * (m / p).log() + m * (m / q).log()).sum(dim=1).mean() / 2
    return 1 - both.clamp(0, 1)
