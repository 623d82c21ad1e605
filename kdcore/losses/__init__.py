"""LOSSES: the literal table of every loss that a configuration may name."""

from __future__ import annotations

from collections.abc import Mapping

from kdcore.kdiffusion.term import ReverseDiffusion
from kdcore.losses.attention import attention_distance, attention_transfer, class_activation
from kdcore.losses.bank import MemoryContrast
from kdcore.losses.boundaries import ActivationBoundaries, MarginRelu
from kdcore.losses.class_transport import class_transport
from kdcore.losses.conditional import conditional_wasserstein, joint_distribution_wasserstein
from kdcore.losses.contrast import in_batch_contrast
from kdcore.losses.copies import ManyToOne
from kdcore.losses.correlations import (
    channel_correlation,
    consecutive_correlation,
    kernel_correlation,
)
from kdcore.losses.decoupled import decoupled_kd, normalised_kd
from kdcore.losses.denoising import Denoising
from kdcore.losses.distributions import (
    energy,
    gromov,
    maximum_mean_discrepancy,
    sinkhorn,
    sliced,
    unbalanced,
    wasserstein,
)
from kdcore.losses.factors import FactorTransfer
from kdcore.losses.features import mean_squared_error, softmax_regression
from kdcore.losses.flow import Flow
from kdcore.losses.gaussians import (
    conditional_gaussian_kl,
    conditional_gaussian_wasserstein,
    gaussian_kl,
    gaussian_wasserstein,
)
from kdcore.losses.hints import Hints, ReusableMap, VariationalInformation
from kdcore.losses.logits import (
    cross_entropy,
    jensen_shannon,
    kd,
    reverse_kd,
    soft_cross_entropy,
    sparse_kd,
)
from kdcore.losses.masked import MaskedGeneration
from kdcore.losses.predictions import multi_level_kd, prediction_correlation
from kdcore.losses.regions import regional_kd
from kdcore.losses.relations import relational_kd, similarity_divergence, similarity_preservation
from kdcore.losses.review import Review
from kdcore.losses.statistics import channel_moments, neuron_selectivity
from kdcore.losses.temperatures import (
    LearnedTemperature,
    standardised_kd,
    transformed_teacher,
    weighted_transformed_teacher,
)
from kdcore.taps import EMBEDDING
from kdcore.terms import Features, Logits, Loss, Stateful, Term

__all__ = ["LOSSES", "Features", "Logits", "Loss", "Stateful", "Term"]

LOSSES: Mapping[str, Loss] = {
    "ce": Logits(cross_entropy, mixes=True),
    "kd": Logits(kd, weight=0.9),
    "reverse_kd": Logits(reverse_kd),
    "js": Logits(jensen_shannon),
    "sparse_kd": Logits(sparse_kd, weight=0.9),
    "soft_ce": Logits(soft_cross_entropy, weight=0.9),
    "lskd": Logits(standardised_kd, weight=9.0),
    "ttm": Logits(transformed_teacher, weight=45.0),
    "wttm": Logits(weighted_transformed_teacher, weight=4.0),
    "ctkd": Stateful(LearnedTemperature, weight=0.9),
    "dkd": Logits(decoupled_kd),
    "nkd": Logits(normalised_kd),
    "wkd_l": Logits(class_transport),
    "dist": Logits(prediction_correlation, batch_level=True, weight=2.0),
    "mlkd": Logits(multi_level_kd, batch_level=True, weight=0.9),
    "sdd": Features(regional_kd, project=False, layers={}, weight=0.9),
    "rkd": Features(relational_kd, batch_level=True, project=False),
    "pkt": Features(similarity_divergence, batch_level=True, project=False, weight=30000.0),
    "sp": Features(similarity_preservation, batch_level=True, project=False, weight=3000.0),
    "cc": Features(kernel_correlation, batch_level=True, project=False, weight=0.003),
    "cc_consecutive": Features(consecutive_correlation, batch_level=True, weight=0.02),
    "ickd": Features(channel_correlation, layers={}, weight=2.5),
    "infonce": Features(in_batch_contrast, batch_level=True),
    "crd": Stateful(MemoryContrast, layers={EMBEDDING: EMBEDDING}, weight=0.8),
    "mse": Features(mean_squared_error),
    "fitnet": Stateful(Hints, weight=100.0),
    "srrl": Features(softmax_regression),
    "vid": Stateful(VariationalInformation),
    "simkd": Stateful(ReusableMap),
    "at": Features(attention_transfer, layers={}, project=False, weight=1000.0),
    "at_paper": Features(attention_distance, layers={}, project=False, weight=500 / 64),  # 8x8 maps
    "cat_kd": Features(class_activation, layers={}, project=False, weight=80.0),
    "nst": Features(neuron_selectivity, layers={}, project=False, weight=50.0),
    "wkd_f": Features(channel_moments, layers={}, weight=0.3),
    "fsp": Stateful(Flow, weight=50.0),
    "ab": Stateful(ActivationBoundaries, weight=0.003),
    "ofd": Stateful(MarginRelu, weight=0.001),
    "reviewkd": Stateful(Review, weight=5.0),
    "ft": Stateful(FactorTransfer, weight=500.0),
    "mgd": Stateful(MaskedGeneration, weight=7e-5),
    "norm": Stateful(ManyToOne),
    "diffkd": Stateful(Denoising),
    "kdiffusion": Stateful(ReverseDiffusion),
    "w2": Features(wasserstein, batch_level=True),
    "cw2": Features(conditional_wasserstein, batch_level=True),
    "jw2": Features(joint_distribution_wasserstein, batch_level=True),
    "sinkhorn": Features(sinkhorn, batch_level=True),
    "sliced_w2": Features(sliced, batch_level=True),
    "unbalanced_w2": Features(unbalanced, batch_level=True),
    "gw": Features(gromov, batch_level=True, project=False),
    "mmd": Features(maximum_mean_discrepancy, batch_level=True),
    "energy": Features(energy, batch_level=True),
    "gaussian_w2": Features(gaussian_wasserstein, batch_level=True),
    "gaussian_kl": Features(gaussian_kl, batch_level=True),
    "cgaussian_w2": Features(conditional_gaussian_wasserstein, batch_level=True),
    "cgaussian_kl": Features(conditional_gaussian_kl, batch_level=True),
}
