r"""Helmholtz machines: of the eruptions of Old Faithful, bits above and below a first number.

:math:`z_4 \to z_3 \to y_2 \to z_2 \to z_1 \to y_1`, two bits each, two real targets; and of
pictures made of bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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


def belief_generator(bits: Sequence[int], width: int, *, pixels: int) -> DGM:
    r"""Bits all the way down: :math:`z_n \to \dots \to z_1 \to y` with ``bits`` from z1 up.

    The target ``y`` is ``pixels`` independent bits.

    Source: Hinton, Dayan, Frey & Neal 1995, whose layers are linear; ours have a hidden one.
    """
    names = [f"z{level}" for level in range(1, len(bits) + 1)]
    nodes = [Node(names[-1], (), "latent", LearnedBernoulli(bits[-1]))]
    for (name, size), (above, seen) in reversed([*pairwise(zip(names, bits, strict=True))]):
        nodes.append(Node(name, [above], "latent", BernoulliOf(_network(seen, width, size))))
    nodes.append(Node("y", ["z1"], "target", BernoulliOf(_network(bits[0], width, pixels))))
    return DGM(nodes)


def belief_recognition(bits: Sequence[int], width: int, *, pixels: int) -> DGM:
    """q(z | y) of ``belief_generator``: each latent given what the generator puts below it."""
    nodes, below, seen = [Node("y", kind="input")], "y", pixels
    for level, size in enumerate(bits, start=1):
        law = BernoulliOf(_network(seen, width, size))
        nodes.append(Node(f"z{level}", [below], "latent", law))
        below, seen = f"z{level}", size
    return DGM(nodes)


def _network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))
