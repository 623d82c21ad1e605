"""Random numbers from a counter, not from a state: a pure function of what they are drawn for.

So the numbers of a sample are the same in any batch, on any worker, and after a run is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

WORD = 0xFFFFFFFF

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Int[Tensor, "... 4"], key: Tensor | Sequence[int]) -> Int[Tensor, "... 4"]:
    """Philox4x32-10: four 32-bit words per counter.

    Counter and key (of two) are words in [0, 2^32) held as int64, and so is the result.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = (int(word) for word in key)
    for _ in range(10):
        # int64 wraps modulo 2^64 and the shift drags the sign along: a mask undoes both, and what
        # is only combined by xor until the next mask needs none
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = _mixed(second >> 32, c1, k0)
        c2 = _mixed(first >> 32, c3, k1)
        c1, c3 = second, first
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return torch.stack([c0, c1 & WORD, c2, c3 & WORD], dim=-1)


def uniform(
    index: Int[Tensor, " b"], shape: Sequence[int], *, epoch: float, stream: int, seed: int
) -> Float[Tensor, "b ..."]:
    """Float64 numbers in (0, 1), ``shape`` of them for each sample.

    They depend on the sample's row number, the whole epochs trained, the stream and the seed alone.
    One stream per use: two uses of one stream see the same numbers.
    """
    count = math.prod(shape)
    block = torch.arange(-(-count // 4), device=index.device).expand(len(index), -1)
    sample = (index & WORD)[:, None].expand_as(block)
    where = (sample, torch.full_like(block, int(epoch)), block, torch.full_like(block, stream))
    words = philox(torch.stack(where, dim=-1), (seed & WORD, (seed >> 32) & WORD))
    numbers = (words.double() + 0.5) / 2**32  # never 0, whose logarithm normal() would take
    return numbers.flatten(1)[:, :count].reshape(len(index), *shape)


def normal(
    index: Int[Tensor, " b"], shape: Sequence[int], *, epoch: float, stream: int, seed: int
) -> Float[Tensor, "b ..."]:
    r"""Float64 numbers of a standard normal distribution, drawn like ``uniform``.

    .. math:: \sqrt{-2 \log u} \, \cos(2 \pi v), \quad \sqrt{-2 \log u} \, \sin(2 \pi v)

    Source: Box & Muller 1958.
    """
    count = math.prod(shape)
    half = -(-count // 2)
    u, v = uniform(index, (2, half), epoch=epoch, stream=stream, seed=seed).unbind(1)
    numbers = torch.polar((-2 * u.log()).sqrt(), 2 * math.pi * v)
    return torch.view_as_real(numbers).flatten(1)[:, :count].reshape(len(index), *shape)


def _mixed(high: Tensor, word: Tensor, key: int) -> Tensor:
    return high.bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(WORD)
