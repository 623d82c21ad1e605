"""The targets' own distribution, without latents: by enumeration or as a Gaussian.

For models small enough, which are those on which the surrogate's bound can be seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal, Normal

from kdcore.dgm.divergences import DivergenceName, divergence
from kdcore.dgm.families import family_of, innermost
from kdcore.dgm.row_noise import NoiseSource
from kdcore.dgm.trace import Kind, Trace

_MOST_CONFIGURATIONS = 2**16


def marginal_divergence(
    name: DivergenceName,
    teacher: nn.Module,
    student: nn.Module,
    num_rows: int,
    *,
    inputs: Mapping[str, Tensor],
    generator: NoiseSource | None = None,
) -> Float[Tensor, ""]:
    r"""The mean over inputs of the divergence between the targets' marginals.

    .. math:: E_x \, d\big( p_T(y | x), p_S(y | x) \big), \quad
        p(y | x) = \int p(y | \epsilon, x) \, p(\epsilon) \, d\epsilon

    Latents of both models must have a finite support, or be Gaussian with a target whose mean is
    linear in them. Over finite latents only the Kullback-Leibler divergence is known: exactly for
    finite targets, else as the mean of :math:`\log p_T(y) - \log p_S(y)` over samples of the
    teacher, one a row.

    Raises ValueError for other models and divergences.
    """
    with torch.no_grad():
        runs = [_probe(model, inputs) for model in (teacher, student)]
    if all(_is_finite(run, "latent") for run in runs):
        if name != "kl":
            raise ValueError(f"over enumerated latents only 'kl' is known, got {name!r}")
        return _enumerated_kl(teacher, student, num_rows, inputs, generator)
    with torch.no_grad():
        there = gaussian_marginal(teacher, num_rows, inputs=inputs)
    here = gaussian_marginal(student, num_rows, inputs=inputs)
    return divergence(name, there, here).mean()


def log_marginal(
    model: nn.Module,
    targets: Mapping[str, Tensor],
    num_rows: int,
    *,
    inputs: Mapping[str, Tensor],
) -> Float[Tensor, " b"]:
    r"""The exact log density of targets, by a sum over every value of the latents.

    .. math:: \log \sum_z p(y, z | x)

    Raises ValueError for latents without a finite support, and for more than 2^16 configurations.
    """
    with torch.no_grad():
        latents = _configurations(_probe(model, inputs), "latent")
    count = _num_configurations(latents)
    run = Trace(
        num_rows * count,
        inputs=_each(inputs, count),
        values={**_each(targets, count), **_over(latents, num_rows)},
    )
    model(run)
    return run.log_prob().reshape(num_rows, count).logsumexp(dim=1)


def gaussian_marginal(
    model: nn.Module, num_rows: int, *, inputs: Mapping[str, Tensor]
) -> MultivariateNormal:
    r"""The distribution of a target which is linear in Gaussian latents, one per row.

    .. math:: y = c + C \epsilon + \sigma \xi \ \Rightarrow\ y \sim N(c, C C^\top + \sigma^2 I)

    c and C are read off one run at no noise and at each unit vector.

    Raises ValueError for a model that a further row of noise shows not to be linear, or whose
    latents or only target are not Gaussian.
    """
    with torch.no_grad():
        probe = _probe(model, inputs)
    _check_gaussian(probe)
    noise, elsewhere = _unit_noise(probe, num_rows)
    count = len(elsewhere) + 2
    run = Trace(num_rows * count, inputs=_each(inputs, count), noise=noise)
    model(run)
    law = _only_target(run)
    mean = law.loc.reshape(num_rows, count, -1)
    scale = law.scale.reshape(num_rows, count, -1)
    centre, columns = mean[:, 0], mean[:, 1:-1] - mean[:, :1]
    _check_linear(mean[:, -1], centre + elsewhere @ columns, scale)
    variance = torch.diag_embed(scale[:, 0].square())
    covariance = torch.einsum("bkm,bkn->bmn", columns, columns) + variance
    return MultivariateNormal(centre, covariance, validate_args=False)


def _enumerated_kl(
    teacher: nn.Module,
    student: nn.Module,
    num_rows: int,
    inputs: Mapping[str, Tensor],
    generator: NoiseSource | None,
) -> Float[Tensor, ""]:
    with torch.no_grad():
        run = Trace(num_rows, inputs=inputs, generator=generator)
        teacher(run)
        if _is_finite(run, "target"):
            targets = _configurations(_probe(teacher, inputs), "target")
            count = _num_configurations(targets)
            values, inputs = _over(targets, num_rows), _each(inputs, count)
        else:
            values, count = run.values("target"), 1
        there = log_marginal(teacher, values, num_rows * count, inputs=inputs)
    here = log_marginal(student, values, num_rows * count, inputs=inputs)
    if count == 1:
        return (there - here).mean()
    return (there.exp() * (there - here)).sum() / num_rows


def _probe(model: nn.Module, inputs: Mapping[str, Tensor]) -> Trace:
    run = Trace(1, inputs={name: given[:1] for name, given in inputs.items()})
    model(run)
    return run


def _is_finite(run: Trace, kind: Kind) -> bool:
    laws = [innermost(site.distribution) for site in run.of_kind(kind).values()]
    return all(law.has_enumerate_support for law in laws)


def _configurations(run: Trace, kind: Kind) -> dict[str, Tensor]:
    """Every value of every variable of one kind: for each name all joint values, in rows."""
    sites = run.of_kind(kind)
    if not _is_finite(run, kind):
        raise ValueError(f"the {kind}s {list(sites)} have no finite support to enumerate")
    own = {name: _joint_support(innermost(site.distribution)) for name, site in sites.items()}
    if math.prod(map(len, own.values())) > _MOST_CONFIGURATIONS:
        raise ValueError(f"the {kind}s {list(sites)} have more than {_MOST_CONFIGURATIONS} values")
    index = (
        torch.cartesian_prod(*(torch.arange(len(held)) for held in own.values())) if own else None
    )
    if index is None:
        return {}
    columns = index.reshape(len(index), -1).unbind(dim=1)
    return {name: own[name][column] for name, column in zip(own, columns, strict=True)}


def _joint_support(law: Distribution) -> Tensor:
    """All values of one row: every unit through all of its own."""
    single = law.enumerate_support(expand=False)
    num_values, units = len(single), math.prod(law.batch_shape[1:])
    if num_values**units > _MOST_CONFIGURATIONS:
        raise ValueError(f"a variable of {units} units has more than {_MOST_CONFIGURATIONS} values")
    choices = torch.cartesian_prod(*[torch.arange(num_values)] * units).reshape(-1, units)
    flat = single.reshape(num_values, *law.event_shape)[choices]
    return flat.reshape(len(choices), *law.batch_shape[1:], *law.event_shape)


def _num_configurations(grid: Mapping[str, Tensor]) -> int:
    return len(next(iter(grid.values()))) if grid else 1


def _each(values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Every row as often as there are configurations."""
    return {name: value.repeat_interleave(count, dim=0) for name, value in values.items()}


def _over(grid: Mapping[str, Tensor], num_rows: int) -> dict[str, Tensor]:
    """All configurations, once for every row."""
    return {name: v.repeat(num_rows, *[1] * (v.ndim - 1)) for name, v in grid.items()}


def _unit_noise(probe: Trace, num_rows: int) -> tuple[dict[str, Tensor], Float[Tensor, " k"]]:
    """Zeros, each unit vector and a point elsewhere as noise of every row; and that point."""
    own = {name: given[0] for name, given in probe.noise().items()}
    sizes = [given.numel() for given in own.values()]
    like = next(iter(own.values()))
    unit = torch.eye(sum(sizes), dtype=like.dtype, device=like.device)
    elsewhere = torch.linspace(-1.3, 2.1, len(unit)).to(like)
    rows = torch.cat([torch.zeros_like(unit[:1]), unit, elsewhere[None]])
    parts = torch.split(rows.repeat(num_rows, 1), sizes, dim=1)
    shaped = zip(own.items(), parts, strict=True)
    noise = {name: part.reshape(-1, *given.shape) for (name, given), part in shaped}
    return noise, elsewhere


def _check_gaussian(run: Trace) -> None:
    latents = run.of_kind("latent")
    laws = {name: family_of(innermost(site.distribution)).noise for name, site in latents.items()}
    others = [name for name, law in laws.items() if law not in ("normal", "none")]
    targets = [innermost(site.distribution) for site in run.of_kind("target").values()]
    if others or not run.noise() or [type(law) for law in targets] != [Normal]:
        raise ValueError(
            "exact marginals need latents of finite support, or Gaussian ones under a single "
            f"Gaussian target; got latents {sorted(laws)}, targets {list(run.values('target'))}"
        )


def _only_target(run: Trace) -> Normal:
    (site,) = run.of_kind("target").values()
    law = innermost(site.distribution)
    assert isinstance(law, Normal)
    return law


def _check_linear(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    tolerance = torch.finfo(found.dtype).eps ** 0.5
    size = expected.detach().abs().max() + 1
    off = max(
        float((found - expected).detach().abs().max()), float((scale - scale[:, :1]).abs().max())
    )
    if off > tolerance * size:
        raise ValueError(
            "the target is not linear in the latents with a constant standard deviation, so its "
            f"marginal is no Gaussian: a further point is off by {off:.1e}"
        )
