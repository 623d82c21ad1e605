"""Losses on the distribution of a feature over the batch, by transport or kernels.

Distances are squared, and in units of the teacher's total variance unless ``normalise="none"``
(``samples``): then bandwidths, regularisers and prices are numbers near 1 for any network.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from kdcore.losses.samples import Normalise, Positions, paired_samples, samples
from kdcore.metrics.entropic import (
    entropic_wasserstein,
    sinkhorn_divergence,
    unbalanced_wasserstein,
)
from kdcore.metrics.kernels import (
    energy_distance,
    gaussian_mmd,
    polynomial_mmd,
    squared_mean_distance,
)
from kdcore.metrics.relaxed import (
    gromov_wasserstein,
    random_directions,
    sliced_wasserstein,
)
from kdcore.metrics.transport import squared_wasserstein


def wasserstein(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between the batch of student and of teacher features.

    .. math:: \frac1v \min_{\gamma \in \Gamma(1/n, 1/m)} \sum_{ij} \gamma_{ij} \|s_i - t_j\|^2

    With ``normalise="variance"``, v is the total variance of the teacher's rows, so that one weight
    means the same for any width and scale; with ``"none"``, or where they do not vary, v is 1.
    Maps and tokens are averaged over positions first. Over the same pictures it is at most the
    mean squared distance of the pairs, and equals it once every student feature is nearest its own
    teacher's; between unpaired batches it is biased upwards by the variance, so do not use it so.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the row W2(E), which has v = 1.
    """
    return squared_wasserstein(
        *paired_samples(student, teacher, normalise=normalise, positions=positions)
    )


def sinkhorn(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    reg: float = 0.1,
    debiased: bool = True,
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Entropic squared Wasserstein distance, less that of each sample with itself.

    .. math:: W_\epsilon(S, T) - \tfrac12 W_\epsilon(S, S) - \tfrac12 W_\epsilon(T, T), \quad
        W_\epsilon = \min_P \langle P, C \rangle + \epsilon \, \mathrm{KL}(P \| a b^\top)

    or the first term alone where not ``debiased``, which is then least when the student's features
    have shrunk. ``reg`` is in units of the squared distances.

    Source: Feydy and others 2019, arXiv:1810.08278, equation 3; Cuturi 2013, arXiv:1306.0895.
    """
    rows = paired_samples(student, teacher, normalise=normalise, positions=positions)
    return (sinkhorn_divergence if debiased else entropic_wasserstein)(*rows, reg=reg)


def sliced(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    num_directions: int = 64,
    seed: int = 0,
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Mean squared 2-Wasserstein distance of projections on random directions.

    .. math:: \frac1{vL} \sum_l W_2^2(\theta_l^\top S, \theta_l^\top T)

    The same directions at every step, drawn from ``seed``: take more of them in wide spaces. About
    1/d of ``w2``, so that its weight is d times larger.

    Source: Bonneel and others 2015, Sliced and Radon Wasserstein Barycenters of Measures.
    """
    here, there = paired_samples(student, teacher, normalise=normalise, positions=positions)
    directions = random_directions(here.shape[1], num_directions, seed=seed, like=here)
    return sliced_wasserstein(here, there, directions)


def unbalanced(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    reg: float = 0.1,
    margin: float = 1.0,
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Entropic transport that leaves far samples alone at a price.

    .. math:: \min_{P \ge 0} \langle P, C \rangle + \epsilon \, \mathrm{KL}(P \| a b^\top)
        + \tau \, \mathrm{KL}(P 1 \| a) + \tau \, \mathrm{KL}(P^\top 1 \| b)

    with :math:`\epsilon` = ``reg`` and :math:`\tau` = ``margin``, both in units of the squared
    distances.

    Source: Chizat and others 2018, arXiv:1607.05816.
    """
    rows = paired_samples(student, teacher, normalise=normalise, positions=positions)
    return unbalanced_wasserstein(*rows, reg=reg, margin=margin)


def maximum_mean_discrepancy(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    kernel: Literal["linear", "gaussian", "polynomial"] = "gaussian",
    bandwidth: float | Literal["mean", "median"] = 1.0,
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0),
    unbiased: bool = False,
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Squared maximum mean discrepancy between student and teacher features.

    .. math:: \overline{k(s, s')} + \overline{k(t, t')} - 2 \, \overline{k(s, t)}

    A linear kernel compares means alone; a Gaussian one is the mean over ``scales`` times the
    bandwidth (held constant where it is the mean or median distance); the polynomial one is squared
    on unit rows. Bandwidth, scales and ``unbiased`` concern the Gaussian kernel only.

    Source: Gretton and others 2012, JMLR 13; Huang & Wang 2017 (NST), arXiv:1707.01219.
    """
    rows = paired_samples(student, teacher, normalise=normalise, positions=positions)
    if kernel == "linear":
        return squared_mean_distance(*rows)
    if kernel == "polynomial":
        return polynomial_mmd(*rows)
    return gaussian_mmd(*rows, bandwidth=bandwidth, scales=scales, unbiased=unbiased)


def energy(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Energy distance between student and teacher features.

    .. math:: \frac1{\sqrt v} \big( 2 \, \overline{\|s - t\|} - \overline{\|s - s'\|}
        - \overline{\|t - t'\|} \big)

    Without bandwidth; in units of a distance, not of its square.

    Source: Szekely & Rizzo 2013, Energy statistics.
    """
    return energy_distance(
        *paired_samples(student, teacher, normalise=normalise, positions=positions)
    )


def gromov(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Squared Gromov-Wasserstein distance between features of any two widths.

    .. math:: \frac1v \min_{\gamma \in \Gamma(1/n, 1/m)} \sum_{ijkl} \gamma_{ij} \gamma_{kl}
        \big( \|s_i - s_k\| - \|t_j - t_l\| \big)^2

    Needs no projector, and is blind to rotations; POT's solver finds a local minimum. Between as
    many rows it starts where each student's row is with its own teacher's and seldom goes far;
    started elsewhere, it would jump between worse minima from step to step.

    Source: Peyre, Cuturi & Solomon 2016, Gromov-Wasserstein averaging.
    """
    here, there = samples(student, teacher, normalise=normalise, positions=positions)
    return gromov_wasserstein(here, there, paired=len(here) == len(there))
