r"""The Helmholtz machine of the eruptions of Old Faithful: bits above and below a first number.

:math:`z_4 \to z_3 \to y_2 \to z_2 \to z_1 \to y_1`, two bits each, two real targets.
"""

from __future__ import annotations

from torch import nn

from kdcore.dgm.conditionals import BernoulliOf, LearnedBernoulli, NormalOf
from kdcore.dgm.graph import DGM, Node

_BITS = 2
_DEVIATION = 0.5


def helmholtz_generator(width: int) -> DGM:
    """p(z, y): what is distilled; published with a hidden width of 8 and of 2.

    Latents ``z1`` to ``z4``, targets ``y1`` and ``y2``, (B, 1), of standard deviation 0.5. A target
    is the parent of a latent, so a student sees the teacher's.

    Source: Chen et al. 2023; Dayan, Hinton, Neal & Zemel 1995, "The Helmholtz machine".
    """
    return DGM(
        [
            Node("z4", (), "latent", LearnedBernoulli(_BITS)),
            Node("z3", ["z4"], "latent", BernoulliOf(_network(_BITS, width, _BITS))),
            Node("y2", ["z3"], "target", NormalOf(_network(_BITS, width, 1), scale=_DEVIATION)),
            Node("z2", ["y2"], "latent", BernoulliOf(_network(1, width, _BITS))),
            Node("z1", ["z2"], "latent", BernoulliOf(_network(_BITS, width, _BITS))),
            Node("y1", ["z1"], "target", NormalOf(_network(_BITS, width, 1), scale=_DEVIATION)),
        ]
    )


def helmholtz_recognition(width: int) -> DGM:
    """q(z | y): each latent given what the generator puts around it, from the bottom up.

    The publications do not say which. z2 sees z1 and y2, on which its posterior depends.
    """
    return DGM(
        [
            Node("y1", kind="input"),
            Node("y2", kind="input"),
            Node("z1", ["y1"], "latent", BernoulliOf(_network(1, width, _BITS))),
            Node("z2", ["z1", "y2"], "latent", BernoulliOf(_network(_BITS + 1, width, _BITS))),
            Node("z3", ["y2"], "latent", BernoulliOf(_network(1, width, _BITS))),
            Node("z4", ["z3"], "latent", BernoulliOf(_network(_BITS, width, _BITS))),
        ]
    )


def _network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))
