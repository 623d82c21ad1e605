"""Every number of the data-free oracle, in float64 and float32, and its gradients."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.batch_norm import moments
from kdcore.datafree.adversaries import (
    absolute_disagreement,
    clamped_competition,
    competition,
    disagreement,
    masked_disagreement,
)
from kdcore.datafree.contrast import view_contrast
from kdcore.datafree.generated import reptile_gradient
from kdcore.datafree.images import (
    batch_length,
    mean_length,
    total_variation,
    total_variation_norm,
)
from kdcore.datafree.predictions import (
    class_cross_entropy,
    class_imbalance,
    entropy,
    one_hot,
    soft_cross_entropy,
    soft_divergence,
)
from kdcore.datafree.statistics import (
    AveragedDistance,
    Moments,
    activation,
    record_error,
    statistics_distance,
    statistics_divergence,
)
from kdcore.datafree.targets import class_similarity, correlations, symmetric_root
from kdcore.losses.attention import attention_distance, attention_transfer
from kdcore.losses.features import mean_squared_error
from kdcore.losses.flow import flow_distance, flow_matrix
from kdcore.losses.logits import jensen_shannon, kd

FOLDER = Path(os.environ.get("KD_ORACLES", Path(__file__).parents[3] / "shared" / "oracles"))
FILE = FOLDER / "datafree.json"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not FILE.is_file(), reason=f"no oracles at {FILE}; KD_ORACLES names them"),
    pytest.mark.usefixtures("without_shape_checks"),
]

VALUES: Mapping[str, Any] = json.loads(FILE.read_text())["values"] if FILE.is_file() else {}


class Inputs:
    """The stored tensors, by attribute."""

    def __init__(self, dtype: torch.dtype) -> None:
        with np.load(FOLDER / "datafree_inputs.npz") as stored:
            held = {name: torch.from_numpy(stored[name]) for name in stored.files}
        self.tensors = {
            name: values.to(dtype) if values.is_floating_point() else values
            for name, values in held.items()
        }

    def __getattr__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def moments(self) -> list[Moments]:
        return [Moments(*moments(maps)) for maps in (self.h0, self.h1)]

    @property
    def running(self) -> list[Moments]:
        return [Moments(self.rm0, self.rv0), Moments(self.rm1, self.rv1)]


Formula = Callable[[Inputs], Tensor]


def clamped_divergence(x: Inputs) -> Tensor:
    return 1 - clamped_competition(x.s, x.t)


def averaged(x: Inputs) -> Tensor:
    """The averages are 0.1 and 0.8 in every channel."""
    prior = AveragedDistance(x.moments)
    prior.rounds += 1
    for kept in prior.averages:
        kept.mean.fill_(0.1)
        kept.variance.fill_(0.8)
    return prior(x.moments, x.running)


def dafl(x: Inputs, one: float, balance: float, active: float) -> Tensor:
    return one * one_hot(x.t) + balance * class_imbalance(x.t, base=10) + active * activation(x.f)


def zskt(x: Inputs) -> Tensor:
    return kd(x.s, x.t, temperature=1) / x.s.shape[1]


def auxiliary(x: Inputs, sign: float = 1) -> Tensor:
    imbalance = class_imbalance(x.t)
    return statistics_divergence(x.moments, x.running, eps=0) + entropy(x.t) + sign * imbalance


def dfq(x: Inputs) -> Tensor:
    both = disagreement(x.s, x.t) + disagreement(x.s2, x.t)
    return both / 2 + 0.1 * auxiliary(x)


def flow(x: Inputs, pool: Any, reduction: Any) -> Tensor:
    here = flow_matrix(x.fsp_sa, x.fsp_sb, pool=pool)
    there = flow_matrix(x.fsp_ta, x.fsp_tb, pool=pool)
    return flow_distance(here, there, reduction=reduction)


def literal_contrast(x: Inputs) -> Tensor:
    """As a blog prints it; ours must not be this."""
    products = x.loc @ x.glo.T
    return (products.diagonal().exp() / products.sum(dim=1)).mean()


def banked(x: Inputs) -> Tensor:
    return view_contrast(x.loc, x.glo, num_current=8)


def slope(formula: Formula, name: str) -> Formula:
    def norm(x: Inputs) -> Tensor:
        asked = x.tensors[name].requires_grad_()
        (gradient,) = torch.autograd.grad(formula(x), asked)
        return gradient.norm()

    return norm


def masked(x: Inputs) -> Tensor:
    return masked_disagreement(x.s, x.t)


def distance(x: Inputs) -> Tensor:
    return statistics_distance(x.moments, x.running)


def divergence(x: Inputs) -> Tensor:
    return statistics_divergence(x.moments, x.running, eps=0)


FORMULAS: Mapping[str, Formula] = {
    "kd_kl_T1": lambda x: kd(x.s, x.t, temperature=1),
    "kd_kl_T4": lambda x: kd(x.s, x.t, temperature=4),
    "kd_kl_T20": lambda x: kd(x.s, x.t, temperature=20),
    "zskt_kl_mean": zskt,
    "zskt_generator_loss": lambda x: disagreement(x.s, x.t, reduction="entries"),
    "adv_l1_dfad": lambda x: absolute_disagreement(x.s, x.t),
    "js_exact_T3": lambda x: jensen_shannon(x.s, x.t, temperature=3),
    "js_nvidia_T3": clamped_divergence,
    "r_compete_exact": lambda x: competition(x.s, x.t),
    "r_compete_nvidia": lambda x: clamped_competition(x.s, x.t),
    "ce": lambda x: class_cross_entropy(x.t, x.y),
    "onehot": lambda x: one_hot(x.t),
    "entropy": lambda x: entropy(x.t),
    "balance_nats": lambda x: class_imbalance(x.t),
    "balance_log10": lambda x: class_imbalance(x.t, base=10),
    "act_l1": lambda x: activation(x.f),
    "dafl_total_mnist": lambda x: dafl(x, 1, 5, 0.1),
    "dafl_total_cifar10": lambda x: dafl(x, 0.05, 5, 0.01),
    "bn_l2": distance,
    "bn_l2_first10": lambda x: statistics_distance(x.moments, x.running, first_factor=10),
    "bn_kl": divergence,
    "bn_l2_ema": averaged,
    "tv_l1": lambda x: total_variation(x.x),
    "tv_l2": lambda x: total_variation_norm(x.x),
    "l2_batch": lambda x: batch_length(x.x),
    "l2_sample_mean": lambda x: mean_length(x.x),
    "agree_mask": lambda x: (x.s.argmax(1) == x.t.argmax(1)).to(x.s),
    "adv_masked_T1": masked,
    "contrastive_first_batch": lambda x: view_contrast(x.loc[:8], x.glo[:8], num_current=8),
    "contrastive_with_bank": banked,
    "contrastive_blog_literal": literal_contrast,
    "at_code": lambda x: attention_transfer(x.at_s, x.at_t),
    "at_paper": lambda x: attention_distance(x.at_s, x.at_t),
    "zskt_student_loss": lambda x: zskt(x) + 250 * attention_transfer(x.at_s, x.at_t),
    "fsp_yim_maxpool": lambda x: flow(x, "max", "sum"),
    "fsp_repdistiller_avgpool": lambda x: flow(x, "average", "mean"),
    "feature_mse": lambda x: mean_squared_error(x.at_t[:, :3], x.at_s),
    "zskd_alpha_row0": lambda x: class_similarity(x.W)[0],
    "zskd_targets_row0": lambda x: x.dirichlet_targets[0],  # given: the law is tested elsewhere
    "zskd_soft_ce_T20": lambda x: soft_cross_entropy(x.t, x.dirichlet_targets),
    "sttss_R_row0": lambda x: correlations(x.Wc)[0],
    "sttss_targets_row0": lambda x: x.sttss_logits.softmax(dim=1)[0],
    "sttss_kl": lambda x: soft_divergence(x.t, x.sttss_logits.softmax(dim=1)),
    "lopes_top_layer": lambda x: record_error(x.t, x.rec),
    "lopes_sample_correct_row0": lambda x: (x.eps3 @ symmetric_root(x.cov3))[0],
    "lopes_sample_official_row0": lambda x: (x.eps3 @ x.cov3)[0],
    "dfq_aux_g1": auxiliary,
    "dfq_aux_blog_sign": lambda x: auxiliary(x, sign=-1),
    "dfq_generator_objective_S2": dfq,
    "reptile_grad": lambda x: reptile_gradient(x.theta, x.phi),
    "grad_adv_masked_s_norm": slope(masked, "s"),
    "grad_adv_masked_t_norm": slope(masked, "t"),
    "grad_contrastive_local_norm": slope(banked, "loc"),
    "grad_bn_l2_h0_norm": slope(distance, "h0"),
    "grad_bn_kl_h0_norm": slope(divergence, "h0"),
    "grad_js_exact_t_norm": slope(lambda x: jensen_shannon(x.s, x.t, temperature=3), "t"),
    "grad_js_nvidia_t_norm": slope(clamped_divergence, "t"),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("name", [pytest.param(name, id=f"datafree-{name}") for name in VALUES])
def test_the_value_is_the_oracles(name: str, dtype: torch.dtype) -> None:
    if name == "grad_contrastive_global_is_none":
        x = Inputs(dtype)
        assert VALUES[name] == str(_has_no_gradient(x))
        return
    found = FORMULAS[name](Inputs(dtype))
    assert found.dtype is dtype
    expected = torch.tensor(VALUES[name], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=1e-10)


def _has_no_gradient(x: Inputs) -> bool:
    x.loc.requires_grad_()
    x.glo.requires_grad_()
    banked(x).backward()
    return x.glo.grad is None


def test_the_drawn_logits_of_the_oracle_have_the_correlations_of_the_classifier() -> None:
    x = Inputs(torch.float64)
    root = symmetric_root(correlations(x.W))
    torch.testing.assert_close(root @ root, correlations(x.W), rtol=1e-10, atol=1e-12)
    # the stored logits are 1.5 noise @ root: their noise must be of full rank and unit scale
    noise = torch.linalg.lstsq(root, x.sttss_logits.mT / 1.5).solution.mT
    torch.testing.assert_close(1.5 * noise @ root, x.sttss_logits, rtol=1e-8, atol=1e-10)
    assert F.relu(noise.square().mean() - 2) == 0
