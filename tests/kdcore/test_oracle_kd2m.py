"""Every number of the KD2M oracle, in value and gradient, in float64 and float32."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcore.metrics.bounds import Bounds, risk_bounds
from kdcore.metrics.classes import class_mean_distance, shared_classes
from kdcore.metrics.conditional import class_wasserstein, joint_wasserstein, label_costs
from kdcore.metrics.distances import distances
from kdcore.metrics.entropic import entropic_wasserstein, sharp_wasserstein, sinkhorn_divergence
from kdcore.metrics.gaussians import (
    class_gaussian_kl,
    class_gaussian_wasserstein,
    gaussian_kl,
    gaussian_wasserstein,
)
from kdcore.metrics.kernels import (
    energy_distance,
    gaussian_mmd,
    mean_bandwidth,
    polynomial_mmd,
    squared_mean_distance,
)
from kdcore.metrics.plans import transport_plan
from kdcore.metrics.relaxed import sliced_wasserstein
from kdcore.metrics.transport import (
    squared_costs,
    squared_wasserstein,
    wasserstein_1,
)
from kdcore.types import Classifier

FOLDER = Path(os.environ.get("KD_ORACLES", Path(__file__).parents[3] / "shared" / "oracles"))
FILE = FOLDER / "kd2m.json"
RELATIVE = {torch.float64: 1e-9, torch.float32: 5e-4}
NOT_CASES = {"closed_forms", "_meta"}
# not numbers of a metric: how the case was made, and what the authors' own code printed. That code
# (`official`) crashes or transports the student to itself in half of its entries; what it meant is
# in `official_formulas`, which is tested
NOT_VALUES = {"recipe", "official"}
# the gradient's summaries and the lists are compared whole
WHOLE = {"grad_wrt_S", "plan_support_i_to_j", "ladder_order", "input_check"}

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not FILE.is_file(), reason=f"no oracles at {FILE}; KD_ORACLES names them"),
    pytest.mark.usefixtures("without_shape_checks"),
]

ORACLE: Mapping[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {}
CASES = [name for name in ORACLE if name not in NOT_CASES]
LABEL_COSTS = {
    "onehot_sq": "onehot",
    "onehot_euclid": "onehot_euclidean",
    "probs_sq": "probabilities",
    "logits_sq": "logits",
    "ce_teacher_target": "cross_entropy",
    "kl_student_teacher": "kl",
    "ce_hardlabel_student_pred": "hard_cross_entropy",
}
REDUCTIONS = {
    "sum": "sum",
    "mean_present": "mean_present",
    "mean_nc": "mean_classes",
    "weighted": "frequency",
}


class Inputs:
    """The stored tensors of one case."""

    def __init__(self, case: str, dtype: torch.dtype) -> None:
        with np.load(FOLDER / "kd2m_inputs.npz") as stored:
            arrays = {key: torch.from_numpy(stored[f"{case}/{key}"]) for key in KEYS}
        self.student, self.teacher = arrays["S"].to(dtype), arrays["T"].to(dtype)
        self.labels = arrays["yS"], arrays["yT"]
        self.logits = arrays["LS"].to(dtype), arrays["LT"].to(dtype)
        self.num_classes = self.logits[0].shape[1]
        self.seed = ORACLE[case]["recipe"]["seed"]
        self.case = ORACLE[case]

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        return self.student, self.teacher


KEYS = ("S", "T", "yS", "yT", "LS", "LT")
Formula = Callable[[Inputs], Tensor]


def by_class(function: Callable[..., Tensor], **options: Any) -> Callable[[Inputs, str], Tensor]:
    def value(x: Inputs, key: str) -> Tensor:
        if key == "classes_used":
            here, there = shared_classes(*x.labels).counts
            return ((here > 0) & (there > 0)).sum()
        return function(
            *x.rows, *x.labels, reduction=REDUCTIONS[key], num_classes=x.num_classes, **options
        )

    return value


def joint(x: Inputs, key: str) -> Tensor:
    kind, beta = key.split("__beta")
    cost = label_costs(*x.logits, *x.labels, kind=LABEL_COSTS[kind])
    return joint_wasserstein(*x.rows, cost, beta="max" if beta == "max" else float(beta))


def divergence(covariance: str) -> Callable[[Inputs, str], Tensor]:
    def value(x: Inputs, key: str) -> Tensor:
        kind, eps = key.split("_eps")
        direction = {"S|T": "forward", "T|S": "reverse", "jeffreys_half_sum": "jeffreys"}[kind]
        return gaussian_kl(*x.rows, covariance=covariance, direction=direction, eps=float(eps))

    return value


def sinkhorn(x: Inputs, key: str) -> Tensor:
    reg = 0.1 * distances(*x.rows).square().mean().detach()
    if key == "reg":
        return reg
    return {
        "sharp_<P,C>": sharp_wasserstein,
        "primal_kl_<P,C>+reg*KL(P|ab)": entropic_wasserstein,
        "divergence_debiased": sinkhorn_divergence,
    }[key](*x.rows, reg=reg)


def mmd(x: Inputs, key: str) -> Tensor:
    here, there = x.rows
    if key == "sigma_official_mean":
        return mean_bandwidth(distances(here, here), distances(there, there), distances(*x.rows))
    options: dict[str, dict[str, Any]] = {
        "biased": {"bandwidth": "mean"},
        "unbiased": {"bandwidth": "mean", "unbiased": True},
        "sigma_fixed_4_biased": {"bandwidth": 4.0},
        "multi_bw_mean_of_5": {"bandwidth": "mean", "scales": (0.25, 0.5, 1.0, 2.0, 4.0)},
    }
    return gaussian_mmd(here, there, **options[key])


def sliced(x: Inputs) -> Tensor:
    normal = np.random.default_rng(x.seed + 1000).standard_normal((x.student.shape[1], 64))
    directions = torch.from_numpy(normal / np.linalg.norm(normal, axis=0)).to(x.student)
    return sliced_wasserstein(*x.rows, directions)


def measured_bounds(x: Inputs) -> Bounds:
    shape = (x.num_classes, x.student.shape[1])
    weight = np.random.default_rng(x.seed + 500).standard_normal(shape) / math.sqrt(shape[1])
    head = Classifier(torch.from_numpy(weight).to(x.student), x.student.new_zeros(shape[0]))
    return risk_bounds(*x.rows, x.labels[0], student_head=head, teacher_head=head)


def bound(x: Inputs, key: str) -> Tensor:
    measured = measured_bounds(x)
    risks = measured.under_teacher_head
    values = {
        "R_S": risks.student,
        "R_T": risks.teacher,
        "gap": risks.gap,
        "L_h": risks.lipschitz,
        "L_h_times_cw1_weighted": risks.lipschitz * measured.class_wasserstein_1,
        "L_h_times_paired_l1": risks.lipschitz * measured.paired_l1,
        "L_h_times_L2": risks.lipschitz * measured.paired_l2,
    }
    return torch.tensor(values[key], dtype=x.student.dtype)


def published(x: Inputs, key: str) -> Tensor:
    """What the authors' formulas come to, out of our pieces."""
    here, there = x.rows
    if key == "paired_logit_mse":
        return (x.logits[0] - x.logits[1]).square().sum(dim=1).mean()
    if key == "kl_diag":  # 1e-9 added to standard deviations of which ours has none
        return gaussian_kl(here, there, eps=0.0)
    # they divide the cost by its largest entry rather than multiply the labels' by it, and in all
    # but the "intended" one the teacher's features are the student's
    features = there if key == "jw2_intended" else here
    kind = "kl" if key == "jw2_cce_bug" else "logits"
    cost = label_costs(*x.logits, *x.labels, kind=kind)
    largest = squared_costs(here, features).max()
    return joint_wasserstein(here, features, cost, beta="max") / largest


SECTIONS: dict[str, Callable[[Inputs, str], Tensor]] = {
    "cw2_sq": by_class(class_wasserstein),
    "cw1": by_class(class_wasserstein, power=1),
    "jw2_sq": joint,
    "sinkhorn": sinkhorn,
    "mmd_rbf": mmd,
    "w2_gauss_full_sq_ridge": lambda x, key: gaussian_wasserstein(
        *x.rows, covariance="full", ridge=float(key)
    ),
    "kl_diag": divergence("diagonal"),
    "kl_full": divergence("full"),
    "cw2_gauss_diag_sq": by_class(class_gaussian_wasserstein),
    "cw2_gauss_full_sq": by_class(class_gaussian_wasserstein, covariance="full"),
    "ckl_diag_S|T_eps0.01": by_class(class_gaussian_kl, eps=0.01),
    "cmmd_linear": by_class(class_mean_distance),
    "official_formulas": published,
    "bound": bound,
}
NUMBERS: dict[str, Formula] = {
    "w2_sq": lambda x: squared_wasserstein(*x.rows),
    "w1_euclid": lambda x: wasserstein_1(*x.rows),
    "beta_max_value": lambda x: squared_costs(*x.rows).max(),
    "sliced_w2_sq_L64": sliced,
    "mmd_linear": lambda x: squared_mean_distance(*x.rows),
    "mmd_poly2_l2norm_NST": lambda x: polynomial_mmd(*x.rows),
    "energy_distance": lambda x: energy_distance(*x.rows),
    "w2_gauss_diag_sq": lambda x: gaussian_wasserstein(*x.rows),
    "w2_gauss_full_sq": lambda x: gaussian_wasserstein(*x.rows, covariance="full"),
    "paired_mse_||gS-gT||^2_L2(P)": lambda x: torch.tensor(
        measured_bounds(x).paired_l2 ** 2, dtype=x.student.dtype
    ),
    "paired_mean_l2": lambda x: torch.tensor(measured_bounds(x).paired_l1, dtype=x.student.dtype),
}
GRADIENTS: dict[str, Formula] = {
    "cw2_sq_sum": lambda x: SECTIONS["cw2_sq"](x, "sum"),
    "jw2_sq_onehot_beta1": lambda x: joint(x, "onehot_sq__beta1"),
    "kl_diag_S|T_eps0.01": lambda x: SECTIONS["kl_diag"](x, "S|T_eps0.01"),
    "kl_full_S|T_eps0.1": lambda x: SECTIONS["kl_full"](x, "S|T_eps0.1"),
    "mmd_rbf_biased_sigma_fixed_4": lambda x: mmd(x, "sigma_fixed_4_biased"),
    "mmd_rbf_biased_sigma_official_detached": lambda x: mmd(x, "biased"),
    "sinkhorn_primal_kl": lambda x: sinkhorn(x, "primal_kl_<P,C>+reg*KL(P|ab)"),
}
LADDER = {
    "mmd_linear": "mmd_linear",
    "w2_gauss_diag": "w2_gauss_diag_sq",
    "w2_gauss_full": "w2_gauss_full_sq",
    "w2": "w2_sq",
    "jw2 onehot beta1": "jw2_sq/onehot_sq__beta1",
    "jw2 onehot beta10": "jw2_sq/onehot_sq__beta10",
    "cw2 weighted": "cw2_sq/weighted",
    "paired mse": "paired_mse_||gS-gT||^2_L2(P)",
}


def computed(x: Inputs, path: str) -> Tensor:
    """The library's value for a key of a case, or for `section/key`."""
    section, _, key = path.partition("/")
    return SECTIONS[section](x, key) if key else NUMBERS[section](x)


def value_paths() -> Iterator[tuple[str, str, float | str]]:
    for case in CASES:
        for name, held in ORACLE[case].items():
            if name in NOT_VALUES | WHOLE:
                continue
            entries = held if isinstance(held, dict) else {"": held}
            for key, expected in entries.items():
                if key != "note" and expected is not None:
                    yield case, f"{name}/{key}" if key else name, expected


VALUES = list(value_paths())
SLOPES = [
    (case, name, summary)
    for case in CASES
    for name, summary in ORACLE[case].get("grad_wrt_S", {}).items()
]
DTYPES = pytest.mark.parametrize("dtype", RELATIVE, ids=["float64", "float32"])


def named(entries: list[tuple[str, str, Any]]) -> list[Any]:
    return [pytest.param(*entry, id=f"kd2m-{entry[0]}-{entry[1]}") for entry in entries]


@DTYPES
@pytest.mark.parametrize(("case", "path", "expected"), named(VALUES))
def test_the_value_is_the_oracles(
    case: str, path: str, expected: float | str, dtype: torch.dtype
) -> None:
    x = Inputs(case, dtype)
    if isinstance(expected, str):
        # the published KL of a dead unit is minus infinity; with a floor on the variance it is not
        assert not math.isfinite(float(expected))
        assert bool(gaussian_kl(*x.rows, eps=1e-5).isfinite())
        return
    # the published standard deviations have 1e-9 more than ours, in proportion to their inverse
    relative = 1e-7 if path == "official_formulas/kl_diag" else 0.0
    relative = max(relative, RELATIVE[dtype])
    torch.testing.assert_close(
        computed(x, path).double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=relative,
        atol=1e-12,
    )


@DTYPES
@pytest.mark.parametrize(("case", "name", "summary"), named(SLOPES))
def test_the_gradient_is_the_oracles(
    case: str, name: str, summary: Mapping[str, Any], dtype: torch.dtype
) -> None:
    x = Inputs(case, dtype)
    x.student.requires_grad_()
    formula = GRADIENTS.get(name) or NUMBERS[name]
    formula(x).backward()
    gradient = x.student.grad.double()
    wave = torch.arange(gradient.numel(), dtype=torch.float64).cos()
    head = summary["head_row0"]
    found = [
        gradient.norm(),
        gradient[-1, -1],
        gradient.flatten() @ wave,
        *gradient[0, : len(head)],
    ]
    expected = [summary["fro"], summary["last"], summary["dot_cos"], *head]
    # entries and sums of signs are small beside the whole, to which their error is relative
    torch.testing.assert_close(
        torch.stack(found),
        torch.tensor(expected, dtype=torch.float64),
        rtol=RELATIVE[dtype],
        atol=RELATIVE[dtype] * summary["fro"],
    )


@pytest.mark.parametrize("case", [pytest.param(case, id=f"kd2m-{case}") for case in CASES])
def test_the_stored_inputs_are_those_of_the_case(case: str) -> None:
    x, check = Inputs(case, torch.float64), ORACLE[case]["input_check"]
    found = [x.student.sum(), x.teacher.sum(), x.student[0, 0], x.teacher[-1, -1]]
    found += [x.logits[0].sum(), x.logits[1].sum()]
    names = ("sumS", "sumT", "S00", "T_last", "sumLS", "sumLT")
    expected = torch.tensor([check[name] for name in names], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-12, atol=1e-10)
    assert x.labels[0][: len(check["y_head"])].tolist() == check["y_head"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"kd2m-{case}")
        for case in CASES
        if ORACLE[case].get("plan_support_i_to_j")
    ],
)
def test_the_plan_is_the_oracles(case: str) -> None:
    x = Inputs(case, torch.float64)
    assert (
        transport_plan(squared_costs(*x.rows)).column.tolist()
        == (ORACLE[case]["plan_support_i_to_j"])
    )


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"kd2m-{case}") for case in CASES if "ladder_order" in ORACLE[case]],
)
def test_the_ladder_rises(case: str) -> None:
    x = Inputs(case, torch.float64)
    rungs = torch.stack([computed(x, LADDER[name]) for name in ORACLE[case]["ladder_order"]])
    assert bool((rungs.diff() >= -1e-9).all()), rungs


FORMS: Mapping[str, Any] = ORACLE.get("closed_forms", {})
# the entries that are sentences; test_gaussians.py says them as laws
TOLD = {name for name, form in FORMS.items() if isinstance(form, str)}


def rows_with(mean: list[float], covariance: list[list[float]]) -> Tensor:
    """Four points whose mean and covariance are exactly these."""
    matrix = torch.tensor(covariance, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    root = vectors * (len(matrix) * values.clamp(min=0)).sqrt()
    return torch.tensor(mean, dtype=torch.float64) + torch.cat([root.mT, -root.mT])


@pytest.mark.parametrize(
    "name", [pytest.param(name, id=f"kd2m-{name}") for name in FORMS if name not in TOLD]
)
def test_the_closed_form_is_the_oracles(name: str) -> None:
    form = FORMS[name]
    if "S" in form:
        here, there = (torch.tensor(form[key], dtype=torch.float64)[:, None] for key in "ST")
    else:
        here = rows_with(form.get("muS", [0.0, 0.0]), form["covS"])
        there = rows_with(form.get("muT", [0.0, 0.0]), form["covT"])
    exact = squared_wasserstein if "S" in form else gaussian_wasserstein_full
    formulas: dict[str, Callable[[], Tensor]] = {
        "w2_sq": lambda: exact(here, there),
        "w2_gauss": lambda: gaussian_wasserstein_full(here, there),
        "kl_ST": lambda: gaussian_kl(here, there, covariance="full", eps=0.0),
        "kl_TS": lambda: gaussian_kl(here, there, covariance="full", direction="reverse", eps=0.0),
    }
    inputs = {"S", "T", "muS", "muT", "covS", "covT", "mu", "theta", "note"}
    for key in form.keys() - inputs:
        expected = torch.tensor(form[key], dtype=torch.float64)
        torch.testing.assert_close(formulas[key](), expected, rtol=1e-9, atol=1e-12)


def gaussian_wasserstein_full(student: Tensor, teacher: Tensor) -> Tensor:
    return gaussian_wasserstein(student, teacher, covariance="full")
