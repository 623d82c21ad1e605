"""How far a sample is from a reference, by the four quantities that generators are judged by."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_width
from kdcore.metrics.distances import squared_distances
from kdcore.metrics.gaussians import gaussian_wasserstein
from kdcore.metrics.kernels import gaussian_mmd
from kdcore.metrics.transport import wasserstein_1


def sample_distances(
    sample: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]
) -> dict[str, float]:
    r"""Frechet distance, earth mover's distance, MMD and 1-NN accuracy, in float64.

    "frechet" is the squared W2 distance of the Gaussians of both samples, as FID is; "emd" is exact
    W1; "mmd" is the root of the biased squared MMD with :math:`2\sigma^2` twice the mean squared
    distance within the *reference*, so that it is not symmetric; "one_nn" is
    ``nearest_neighbour_accuracy``. All depend on n, and none is 0 for two samples of one
    distribution: print them beside those of the reference's own distribution.

    Raises ValueError for samples of different widths.

    Source: Xu et al. 2018, arXiv:1806.07755, and the code of Chen et al. 2023, which prints the
    root of the Frechet distance; covariances are divided by n, theirs by n - 1.
    """
    check_same_width(sample, reference)
    here, there = sample.double(), reference.double()
    return {
        "frechet": float(gaussian_wasserstein(here, there, covariance="full")),
        "emd": float(wasserstein_1(here, there)),
        "mmd": float(reference_mmd(here, there)),
        "one_nn": float(nearest_neighbour_accuracy(here, there)),
    }


def reference_mmd(
    sample: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    r"""Maximum mean discrepancy whose kernel is as wide as the reference is.

    .. math:: k(u, v) = \exp\big( -\|u - v\|^2 / 2 \sigma^2 \big), \quad
        \sigma^2 = \frac1{m^2} \sum_{ij} \|t_i - t_j\|^2

    A reference of equal rows has :math:`\sigma = 1`.

    Source: the code of Xu et al. 2018, arXiv:1806.07755; rounding below 0 is cut off.
    """
    centred = reference - reference.mean(dim=0)
    width = float(squared_distances(centred, centred).mean().sqrt())
    squared = gaussian_mmd(sample, reference, bandwidth=width)
    return squared.clamp(min=0).sqrt()


def nearest_neighbour_accuracy(
    sample: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    r"""The share of rows of both samples whose nearest other row is of their own sample.

    At 1/2 the samples cannot be told apart, at 1 always; below 1/2 they are pairs, which samples of
    shared noise are. Nearest by Euclidean distance, a row itself left out.

    Raises ValueError for samples of different sizes, of which the larger would be favoured.

    Source: Lopez-Paz & Oquab 2017, arXiv:1610.06545, section 3.
    """
    if len(sample) != len(reference):
        raise ValueError(
            f"samples must be of the same size, got {len(sample)} and {len(reference)} rows"
        )
    rows = torch.cat([sample, reference])
    rows = rows - rows.mean(dim=0)
    squared = squared_distances(rows, rows).fill_diagonal_(torch.inf)
    from_reference = torch.arange(len(rows), device=rows.device) >= len(sample)
    nearest = from_reference[squared.argmin(dim=1)]
    return (nearest == from_reference).to(sample).mean()
