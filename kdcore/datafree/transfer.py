"""Transfer sets: the pictures of the offline methods, a function of the seed and of the shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kdcore.datafree.images import Normalisation
from kdcore.datafree.measurement import Answers, Rounds, answers, picture_metrics
from kdcore.datafree.plans import Method, Offline
from kdcore.datafree.synthesis import Round, Synthesizer
from kdcore.datafree.targets import AIMED, Records
from kdcore.philox import WORD
from kdcore.taps import Tapped


@dataclass(frozen=True)
class TransferSet:
    """Invented pictures as a dataset keeps them, and what the teacher says of these 8 bits."""

    image: UInt8[Tensor, "n c h w"]
    label: Int[Tensor, " n"]  # the class that was aimed at, where it was, else the teacher's choice
    logits: Float[Tensor, "n k"]
    # of the last round its losses; of all, the classes' shares and the distance of the statistics
    metrics: Mapping[str, float]


def shard_seed(seed: int, shard: int) -> int:
    """The seed of one shard: no two shards of two seeds share it.

    Raises ValueError beyond 32 bits.
    """
    if not (0 <= seed <= WORD and 0 <= shard <= WORD):
        raise ValueError(f"seed and shard are numbers of 32 bits, got {seed} and {shard}")
    return seed | shard << 32


def transfer_set(
    teacher: Tapped,
    method: Method,
    *,
    shape: Sequence[int],
    normalisation: Normalisation,
    count: int,
    seed: int,
    shard: int = 0,
    first: int = 0,
    records: Records | None = None,
) -> TransferSet:
    """``count`` pictures of one shard, byte for byte the same wherever it is made on one thread.

    ``first`` is how many pictures the shards before it have: the classes go on where they end.

    Raises ValueError for a method that needs a student while it makes pictures.
    """
    if not isinstance(method.schedule, Offline):
        raise ValueError(
            "this method makes pictures while its student learns: SyntheticBatches trains on them"
        )
    synthesizer = Synthesizer(
        teacher,
        method,
        shape=shape,
        normalisation=normalisation,
        records=records,
        seed=shard_seed(seed, shard),
        first=first,
    )
    size = method.schedule.batch_size
    rounds = [synthesizer.round() for _ in range(-(-count // size))]
    image = normalisation.stored(torch.cat([made.image for made in rounds]))[:count]
    dtype = synthesizer.like.dtype
    parts = torch.split(image, size)  # what the teacher has room for while pictures are made
    said = answers(teacher, (normalisation.loaded(part, dtype) for part in parts))
    aimed = torch.cat([made.label for made in rounds])[:count]
    label = aimed if isinstance(method.targets, AIMED) else said.logits.argmax(dim=1)
    return TransferSet(image, label, said.logits, _metrics(rounds[-1], said))


def _metrics(last: Round, said: Answers) -> dict[str, float]:
    rounds = Rounds()
    rounds.add(last)
    return rounds.metrics | picture_metrics(said)
