"""Random words for pictures: a pure function of (sample, view, stream, seed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcore.philox import WORD, philox

# One number per use, never used again: these are in every cache.
STREAMS = {
    "crop": 0,
    "flip": 1,
    "order": 2,
    "split": 3,
    "resized_crop": 4,
    "jitter": 5,
    "randaugment": 6,
    "erase": 7,
    "mixup": 8,
    "cutmix": 9,
    "partner": 10,
    "classes": 20,
}
NUMBERS_AT_ONCE = 2**14  # of a permutation: the words of one take twenty times its own memory
_BLOCK_SHIFT = 16  # the counter's last word is the stream, and above it the block of four words


def random_words(
    sample: Tensor, *, view: int, stream: str, seed: int, first: int = 0, blocks: int = 1
) -> Tensor:
    """``4 * blocks`` words in [0, 2^32) for each sample number: (B,) to (B, 4 * blocks), int64.

    ``first`` skips blocks: more words of a stream never shift those before.
    """
    block = torch.arange(first, first + blocks, device=sample.device)
    last = STREAMS[stream] + (block << _BLOCK_SHIFT)
    return _words(sample, view, last, seed).flatten(1)


def permutation(count: int, *, seed: int, epoch: int, stream: str) -> Tensor:
    """The numbers 0 to count - 1 in an order drawn from (seed, epoch)."""
    keys = [
        _keys(random_words(some, view=epoch, stream=stream, seed=seed))
        for some in torch.arange(count).split(NUMBERS_AT_ONCE)
    ]
    return torch.argsort(torch.cat(keys), stable=True)


def _keys(words: Tensor) -> Tensor:
    return (words[:, 0] << 31) | (words[:, 1] >> 1)


@dataclass(frozen=True, slots=True)
class Draws:
    """The words of some samples in one view; ``first`` has four of every stream in use."""

    sample: Tensor  # (B,) int64
    view: int
    seed: int
    first: Mapping[str, Tensor]  # (B, 4)

    def more(self, stream: str, blocks: int, *, rows: Tensor, first: int = 1) -> Tensor:
        """The next ``4 * blocks`` words of some rows."""
        return random_words(
            self.sample[rows],
            view=self.view,
            stream=stream,
            seed=self.seed,
            first=first,
            blocks=blocks,
        )


def draws_of(sample: Tensor, view: int, *, seed: int, streams: Sequence[str]) -> Draws:
    """The first words of all streams at once, which costs little more than those of one."""
    last = torch.tensor([STREAMS[stream] for stream in streams], device=sample.device)
    words = _words(sample, view, last, seed).unbind(1)
    return Draws(sample, view, seed, dict(zip(streams, words, strict=True)))


def scaled(word: Tensor, count: int | Tensor) -> Tensor:
    """A word as one of the numbers 0 to count - 1."""
    return (word * count) >> 32


def happens(word: Tensor, probability: float) -> Tensor:
    """Whether each word, as a share of 2^32, lies below the probability."""
    return word < round(probability * 2**32)  # a power of two: the product is exact


def _words(sample: Tensor, view: int, last: Tensor, seed: int) -> Tensor:
    """(B,) samples and (S,) last words of the counter to (B, S, 4)."""
    shape = len(sample), len(last)
    counter = torch.stack(
        [
            (sample & WORD)[:, None].expand(shape),
            ((sample >> 32) & WORD)[:, None].expand(shape),
            torch.full(shape, view, device=sample.device),
            last.expand(shape),
        ],
        dim=-1,
    )
    return philox(counter, (seed & WORD, (seed >> 32) & WORD))
