"""The prior that pictures differ: two views of one are alike, those of others are not."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.checks import check_same_shape
from kdcore.datafree.memory import FeatureBank
from kdcore.datafree.statistics import Remembering
from kdcore.rows import unit_rows


def view_contrast(
    local: Float[Tensor, "n d"],
    whole: Float[Tensor, "n d"],
    *,
    num_current: int,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    r"""How hard it is to find each local view's own picture among all pictures, by unit rows.

    .. math:: \frac1N \sum_{b \le N} \ell_b + \frac{1}{N'} \sum_{b > N} \ell_b, \quad
        \ell_b = -\log \mathrm{softmax}_j \big( \langle u_b, w_j \rangle / \tau \big)_b

    over the N current pictures and the N' remembered ones behind them, of which there may be none.
    Two means are added, so that a bank of any size weighs as much as the batch. The whole view is
    cut from the graph: it is what the local view has to find, and this is part of the definition.

    Source: Fang and others 2021 (CMI), arXiv:2105.08584, equation 6, and its code.
    """
    check_same_shape(local, whole)
    own = torch.arange(len(local), device=local.device)
    scores = local @ whole.detach().mT / temperature
    losses = F.cross_entropy(scores, own, reduction="none")
    current, remembered = losses[:num_current], losses[num_current:]
    return current.mean() + remembered.mean() if len(remembered) else current.mean()


@final
class Contrast(Remembering):
    r"""``view_contrast`` of a learned embedding of two views, beside pictures of earlier rounds.

    A view is what all BatchNorms of the teacher see of it: the mean over positions of each of their
    input channels, one after the other. The head is two layers; it is trained with the pictures. At
    the end of a round the views of its best pictures go into the bank.

    Source: Fang and others 2021 (CMI), arXiv:2105.08584, section 3.3 and its code, whose bank gives
    no negatives in the one step in which it is exactly full.
    """

    def __init__(
        self,
        instance: Float[Tensor, "b c"],
        *,
        temperature: float = 0.1,
        width: int = 256,
        bank: int = 40960,
        num_negatives: int = 4096,
    ) -> None:
        super().__init__()
        self.temperature, self.num_negatives = temperature, num_negatives
        channels = instance.shape[1]
        self.head = nn.Sequential(
            nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width)
        ).to(instance)
        seed = int(torch.randint(2**31, ()))
        self.bank = FeatureBank(bank, (2, channels), like=instance, seed=seed)
        self._latest: Tensor | None = None
        self._kept: Tensor | None = None

    def forward(
        self, instance: Float[Tensor, "b c"], local_instance: Float[Tensor, "b c"]
    ) -> Float[Tensor, ""]:
        views = torch.stack([local_instance, instance], dim=1)
        self._latest = views.detach()
        views = torch.cat([views, self.bank.draw(self.num_negatives)])
        local, whole = unit_rows(self.head(views)).unbind(dim=1)
        return view_contrast(local, whole, num_current=len(instance), temperature=self.temperature)

    def keep(self) -> None:
        self._kept = self._latest

    def remember(self) -> None:
        if self._kept is not None:
            self.bank.add(self._kept)
        self._kept = None
