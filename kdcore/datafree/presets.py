"""Published data-free methods as data, and noise; where sources disagree, who is followed."""

from __future__ import annotations

from collections.abc import Mapping

from kdcore.datafree.augmentation import Augmentation
from kdcore.datafree.generators import GeneratorNetwork
from kdcore.datafree.plans import (
    Adapted,
    Alternation,
    Distilled,
    EveryEpoch,
    Generators,
    Method,
    Offline,
    Pixels,
    Weighted,
)
from kdcore.datafree.targets import (
    Classes,
    DirichletPredictions,
    GaussianPredictions,
    RecordedActivations,
)

# Lopes, Fenu & Starner 2017, arXiv:1710.07535: the top layer, MNIST, their code's steps and rate.
# Samples have the recorded covariance; `targets.published` has its square, as their code. Their
# records of all layers, and of their spectra, are left out.
LOPES = Method(
    images=Pixels(lr=0.07, start="dark", bounds="none"),
    targets=RecordedActivations(),
    priors={"record": Weighted(layer="logits")},
    schedule=Offline(batch_size=64, steps=1000),
    keep="last",
    losses={"soft_ce": Distilled(weight=1 / 64, params={"temperature": 8.0})},  # without T^2
)

# Nayak and others 2019, arXiv:1905.08114: CIFAR-10. Both concentrations count, as in the paper.
ZSKD = Method(
    images=Pixels(lr=1e-3, start="uniform", bounds="stretch"),
    targets=DirichletPredictions(),
    priors={"soft_class": Weighted(params={"temperature": 20.0})},
    schedule=Offline(batch_size=100, steps=1500),
    keep="last",
    student_view=Augmentation(crop=4, flip=True),  # the teacher is asked again, as they do
    losses={"soft_ce": Distilled(params={"temperature": 20.0})},
)

# Wang 2021, arXiv:2104.04868: MNIST. No code was published: steps and rate are ZSKD's. The
# activation is the classifier's input; the paper has the last convolution's, which
# `priors.activation.layer` may name.
SOFT_TARGET = Method(
    images=Pixels(lr=1e-3, start="uniform", bounds="clip"),
    targets=GaussianPredictions(deviation=1.5),
    priors={
        "soft_divergence": Weighted(),
        "activation": Weighted(weight=0.05, params={"reduction": "sum"}),
    },
    schedule=Offline(batch_size=100, steps=1500),
    keep="last",
    losses={"kd": Distilled(params={"temperature": 20.0})},
)

# Yin and others 2020, arXiv:1912.08795: CIFAR-10, the "paper parameters" of their README. The best
# pictures are kept, which their code means to do (it keeps a name of the last). What they do for
# ImageNet is left out: two resolutions, one after the other, and a rate that falls along a cosine.
DEEPINVERSION = Method(
    images=Pixels(lr=0.05, start="normal", bounds="none"),
    targets=Classes(),
    priors={
        "class": Weighted(),
        "statistics": Weighted(weight=10.0),
        "tv_l2": Weighted(weight=2.5e-5),
    },
    view=Augmentation(roll=2),
    schedule=Offline(batch_size=256, steps=2000),
    losses={"kd": Distilled(params={"temperature": 20.0})},
)

# The same with competition, in the loop of the DataFree benchmark: theirs was never published. The
# divergence is the paper's; `clamped_competition` is the code's. After a random student's epoch.
ADAPTIVE_DEEPINVERSION = Method(
    images=Pixels(lr=0.1, betas=(0.5, 0.99), start="normal", bounds="clip"),
    targets=Classes(),
    priors={
        "class": Weighted(),
        "statistics": Weighted(weight=10.0),
        "tv_l1": Weighted(weight=1e-3),
        "competition": Weighted(weight=1.0, after=1),
    },
    view=Augmentation(roll=4, flip=True),
    schedule=EveryEpoch(batch_size=256, steps=1000, student_steps=400, student_batch_size=128),
    student_view=Augmentation(crop=4, flip=True),
    losses={"kd": Distilled(params={"temperature": 20.0})},
)

# Chen and others 2019, arXiv:1904.01186: MNIST. `statistics` of a weight above 0 is not theirs; it
# is what makes the method work on a small budget.
DAFL = Method(
    images=Generators(
        network=GeneratorNetwork(latent=100, ending="tanh_batch_norm", batch_norm_eps=0.8), lr=0.2
    ),
    priors={
        "one_hot": Weighted(),
        "balance": Weighted(weight=5.0, params={"base": 10.0}),
        "activation": Weighted(weight=0.1),
        "statistics": Weighted(weight=0.0),
    },
    schedule=Alternation(batch_size=512, student_sees="same_pictures", rounds=120),
    losses={"kd": Distilled(params={"temperature": 1.0})},
)

# Micaelli & Storkey 2019, arXiv:1905.09768: CIFAR-10. KL by entries and beta of the squared maps,
# as their code; the equation has a sum of distances, whose beta is another.
ZSKT = Method(
    images=Generators(
        network=GeneratorNetwork(latent=100, ending="batch_norm"),
        lr=1e-3,
        annealed_over=80_000,
        clip_norm=5.0,
    ),
    priors={"disagreement": Weighted(params={"reduction": "entries"})},
    schedule=Alternation(batch_size=128, student_steps=10, student_sees="same_latents", rounds=400),
    student_mode="train",
    losses={
        "kd": Distilled(params={"temperature": 1.0}, per_class=True),
        "at": Distilled(weight=250.0, maps=True),
    },
)

# Choi and others 2020, arXiv:2005.04136: without official code, the sign of the class balance as in
# the paper, alpha and warm-up of a reproduction. `images.count` makes an ensemble of generators.
# A `Synthesizer` also takes several students; a run in YAML has one.
DFQ = Method(
    images=Generators(
        network=GeneratorNetwork(latent=512, ending="tanh_batch_norm"), lr=1e-3, betas=(0.5, 0.999)
    ),
    priors={
        "disagreement": Weighted(after=20_000),
        "statistics_divergence": Weighted(weight=0.01),
        "entropy": Weighted(weight=0.01),
        "balance": Weighted(weight=0.01),
    },
    schedule=Alternation(batch_size=256, student_steps=10, rounds=400, warmup=20_000),
    losses={"kd": Distilled(params={"temperature": 1.0})},
)

# Fang and others 2021, arXiv:2105.08584: CIFAR-10, adversarial, WRN; from 50,000 pictures that are
# made before the student.
CMI = Method(
    images=Adapted(network=GeneratorNetwork(latent=256), lr=1e-3, latent_lr=1e-3, kind="redrawn"),
    targets=Classes(),
    priors={
        "class": Weighted(weight=0.5),
        "statistics": Weighted(),
        "masked_disagreement": Weighted(weight=0.5, after=195),
        "contrast": Weighted(weight=0.8, params={"temperature": 0.1}),
    },
    view=Augmentation(crop=4, flip=True),
    schedule=EveryEpoch(
        batch_size=256, steps=200, student_steps=2000, student_batch_size=128, warmup=195
    ),
    student_view=Augmentation(crop=4, flip=True),
    losses={"kd": Distilled(params={"temperature": 20.0})},
)

# Fang and others 2022, arXiv:2112.15278: CIFAR-10, five steps, FOMAML; `images.kind` has Reptile
# and plain reuse. The outer rate is the inner one times the steps, as their code, whose `reset_l0`
# is left out: it draws the generator's first layers anew in the middle of training.
FAST = Method(
    images=Adapted(
        network=GeneratorNetwork(latent=256), lr=3e-3, latent_lr=0.01, kind="fomaml", meta_lr=0.015
    ),
    targets=Classes(),
    priors={
        "class": Weighted(weight=0.4),
        "averaged_statistics": Weighted(weight=10.0, params={"momentum": 0.9}),
        "masked_disagreement": Weighted(weight=1.1, after=20),
    },
    view=Augmentation(crop=4, flip=True),
    schedule=EveryEpoch(
        batch_size=256, steps=5, student_steps=400, student_batch_size=256, warmup=20
    ),
    student_view=Augmentation(crop=4, flip=True),
    losses={"kd": Distilled(params={"temperature": 20.0})},
)

# The control: what a student learns from the teacher's answers to noise.
NOISE = Method(
    images=Pixels(lr=1.0, start="normal", bounds="clip"),
    priors={},
    schedule=Offline(batch_size=256, steps=0),
    losses={"kd": Distilled(params={"temperature": 20.0})},
)

PRESETS: Mapping[str, Method] = {
    "lopes": LOPES,
    "zskd": ZSKD,
    "soft_target": SOFT_TARGET,
    "deepinversion": DEEPINVERSION,
    "adaptive_deepinversion": ADAPTIVE_DEEPINVERSION,
    "dafl": DAFL,
    "zskt": ZSKT,
    "dfq": DFQ,
    "cmi": CMI,
    "fast": FAST,
    "noise": NOISE,
}
