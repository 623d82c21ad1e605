"""How to compute each classic oracle of feature maps with the library.

``ADAPTERS`` maps a method to ``(entry, tensors) -> value``; the tensors are in the order of the
entry's inputs. An entry belongs to the longest method that its name begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kdcore.losses import LOSSES
from kdcore.losses.attention import (
    attention_distance,
    attention_transfer,
    class_activation_error,
)
from kdcore.losses.boundaries import activation_boundary, gaussian_margin, partial_distance
from kdcore.losses.features import mean_squared_error, softmax_regression
from kdcore.losses.flow import flow_distance, flow_matrix
from kdcore.losses.hints import gaussian_nll
from kdcore.losses.review import hierarchical_distance
from kdcore.losses.statistics import channel_moments, neuron_selectivity
from kdcore.projectors import same_resolution
from kdcore.types import Classifier

Entry = Mapping[str, Any]
Tensors = Sequence[Tensor]
Adapter = Callable[[Entry, Tensors], Tensor]


def of_maps(function: Callable[..., Tensor], **names: str) -> Adapter:
    """The function of maps at one resolution, with the entry's parameters by our names."""

    def value(entry: Entry, tensors: Tensors) -> Tensor:
        params = {ours: entry["params"][name] for ours, name in names.items()}
        return function(*same_resolution(*tensors), **params)

    return value


def flow(pool: str, reduction: str) -> Adapter:
    def value(entry: Entry, tensors: Tensors) -> Tensor:
        here, there = (flow_matrix(*pair, pool=pool) for pair in (tensors[:2], tensors[2:]))
        return flow_distance(here, there, reduction=reduction)

    return value


def likelihood(entry: Entry, tensors: Tensors) -> Tensor:
    return gaussian_nll(*tensors, eps=entry["params"]["eps"])


def boundary_with_its_weight(entry: Entry, tensors: Tensors) -> Tensor:
    value = activation_boundary(*tensors, margin=entry["params"]["margin"])
    return LOSSES["ab"].weight * value


def class_activations(entry: Entry, tensors: Tensors) -> Tensor:
    pooled = [F.adaptive_avg_pool2d(maps, entry["params"]["r"]) for maps in tensors]
    return class_activation_error(*pooled, normalise=entry["params"]["normalise"])


def projected_map(entry: Entry, tensors: Tensors) -> Tensor:
    student, weight, teacher = tensors
    projected = F.conv2d(student, weight[:, :, None, None])
    return mean_squared_error(*same_resolution(projected, teacher))


def projected_embedding(entry: Entry, tensors: Tensors) -> Tensor:
    student, weight, teacher = tensors
    return mean_squared_error(student @ weight.mT, teacher)


def classified_embedding(entry: Entry, tensors: Tensors) -> Tensor:
    student, weight, classifier, bias, logits = tensors
    embedding = student @ weight.mT
    return softmax_regression(
        embedding, embedding, logits, Classifier(classifier, bias), feature_weight=0.0
    )


def pooled_maps(entry: Entry, tensors: Tensors) -> Tensor:
    student, teacher = tensors
    nothing = Classifier(student.new_zeros(1, student.shape[1]), student.new_zeros(1))
    logits = student.new_zeros(len(student), 1)
    return softmax_regression(student, teacher, logits, nothing)


def margins(entry: Entry, tensors: Tensors) -> Tensor:
    return gaussian_margin(*tensors).sum()


ADAPTERS: Mapping[str, Adapter] = {
    "at_mean_square": of_maps(attention_transfer, power="p"),
    "at_l2norm": of_maps(attention_distance, power="p"),
    "nst_poly": of_maps(neuron_selectivity),
    "fsp_mean_avgpool": flow("average", "mean"),
    "fsp_sum_avgpool": flow("average", "sum"),
    "fsp_mean_maxpool": flow("max", "mean"),
    "fsp_sum_maxpool": flow("max", "sum"),
    "fsp_colnorm_maxpool": flow("max", "column_norm"),
    "vid_gaussian": likelihood,
    "ofd_partial_l2": lambda entry, tensors: partial_distance(*tensors),
    "ofd_margins": margins,
    "hcl": of_maps(hierarchical_distance),
    "ab_sum_over_batch": of_maps(activation_boundary, margin="margin"),
    "ab_repdistiller_scale": boundary_with_its_weight,
    "catkd": class_activations,
    "wkd_f": of_maps(
        channel_moments, grid="grid", mean_weight="w_mean", std_weight="w_std", eps="eps"
    ),
    "simkd_feature": projected_map,
    "srrl_feature": projected_embedding,
    "srrl_feature_maps": pooled_maps,
    "srrl_classifier": classified_embedding,
}
