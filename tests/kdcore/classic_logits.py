"""How to compute each classic oracle of logits and embeddings with the library.

``ADAPTERS`` maps a method to ``(entry, tensors) -> value``; the tensors are in the order of the
entry's inputs. An entry belongs to the longest method that its name begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from kdcore.losses.class_transport import other_class_transport
from kdcore.losses.contrast import batch_info_nce, info_nce, noise_contrast
from kdcore.losses.correlations import consecutive_correlation, kernel_correlation
from kdcore.losses.decoupled import decoupled_kd, normalised_kd
from kdcore.losses.features import mean_squared_error
from kdcore.losses.logits import cross_entropy, jensen_shannon, kd, reverse_kd
from kdcore.losses.predictions import batch_gram, class_gram, prediction_correlation
from kdcore.losses.relations import (
    angle_relation,
    distance_relation,
    relational_kd,
    similarity_divergence,
    similarity_preservation,
)
from kdcore.losses.temperatures import (
    standardised_kd,
    transformed_teacher,
    weighted_transformed_teacher,
)

Entry = Mapping[str, Any]
Tensors = Sequence[Tensor]
Adapter = Callable[[Entry, Tensors], Tensor]


def renamed(function: Callable[..., Tensor], **names: str) -> Adapter:
    """The function with the entry's parameters, by our names for them."""

    def value(entry: Entry, tensors: Tensors) -> Tensor:
        return function(*tensors, **{ours: entry["params"][name] for ours, name in names.items()})

    return value


def fixed(function: Callable[..., Tensor], **options: Any) -> Adapter:
    """The function with the options that the entry's name stands for."""
    return lambda entry, tensors: function(*tensors, **options)


def of_temperatures(function: Callable[..., Tensor]) -> Adapter:
    def value(entry: Entry, tensors: Tensors) -> Tensor:
        given = entry["params"]["T"]
        return function(*tensors, temperatures=tuple(given if isinstance(given, list) else [given]))

    return value


def taylor(reduction: str) -> Adapter:
    function = partial(kernel_correlation, normalise="none", reduction=reduction)
    return renamed(function, gamma="gamma", degree="P")


def noise_contrast_of(anchor: Tensor, bank: Tensor, entry: Entry, index: Tensor, z: str) -> Tensor:
    params = entry["params"]
    scores = (anchor @ bank.mT).gather(1, index).div(params["tau"]).exp() / params[z]
    every = index[:, 1:] >= 0
    return noise_contrast(
        scores[:, 0], scores[:, 1:], every, num_rows=params["N"], eps=params["eps"]
    )


def crd_of_student(entry: Entry, tensors: Tensors) -> Tensor:
    here, _, _, bank_of_teacher, index = tensors
    return noise_contrast_of(here, bank_of_teacher, entry, index, "Z_s")


def crd_of_both(entry: Entry, tensors: Tensors) -> Tensor:
    _, there, bank_of_student, _, index = tensors
    of_teacher = noise_contrast_of(there, bank_of_student, entry, index, "Z_t")
    return crd_of_student(entry, tensors) + of_teacher


ADAPTERS: Mapping[str, Adapter] = {
    "ce": fixed(cross_entropy),
    "kd": renamed(kd, temperature="T"),
    "reverse_kl": renamed(reverse_kd, temperature="T"),
    "jsd": renamed(jensen_shannon, temperature="T"),
    "dkd": renamed(decoupled_kd, alpha="alpha", beta="beta", temperature="T"),
    "nkd": renamed(normalised_kd, gamma="gamma", temperature="T"),
    "dist": renamed(
        prediction_correlation, beta="beta", gamma="gamma", temperature="tau", eps="eps"
    ),
    "lskd": renamed(standardised_kd, temperature="T", correction="ddof", eps="eps"),
    "ttm": renamed(transformed_teacher, exponent="g"),
    "wttm": renamed(weighted_transformed_teacher, exponent="g"),
    "mlkd_batch_gram": of_temperatures(batch_gram),
    "mlkd_class_gram": of_temperatures(class_gram),
    "wkd_l_nontarget": renamed(
        other_class_transport, temperature="T", reg="reg", num_iterations="iters"
    ),
    "fitnet_mse": fixed(mean_squared_error),
    "sp": fixed(similarity_preservation),
    "sp_l1rows": fixed(similarity_preservation, row_norm="l1"),
    "rkd": renamed(relational_kd, distance_weight="distance_weight", angle_weight="angle_weight"),
    "rkd_distance": fixed(distance_relation),
    "rkd_angle": fixed(angle_relation),
    "pkt": renamed(similarity_divergence, eps="eps"),
    "pkt_batchmean_noeps": fixed(similarity_divergence, eps=0.0, reduction="batchmean"),
    "cc_consecutive_products": fixed(consecutive_correlation),
    "cc_taylor_norm": taylor("norm"),
    "cc_taylor_squared": taylor("mean_square"),
    "infonce_given_negatives": renamed(info_nce, temperature="tau"),
    "infonce_in_batch": renamed(batch_info_nce, temperature="tau"),
    "crd_nce_student": crd_of_student,
    "crd_nce_total": crd_of_both,
}
