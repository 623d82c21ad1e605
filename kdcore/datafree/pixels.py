"""Pictures whose pixels are changed, each by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from kdcore.datafree.changeable import Parametrisation
from kdcore.datafree.draws import Draw, Stream
from kdcore.datafree.images import Normalisation
from kdcore.datafree.plans import Pixels
from kdcore.rows import gather_rows, num_workers


@final
class PixelPictures(Parametrisation):
    def __init__(
        self, plan: Pixels, shape: Sequence[int], normalisation: Normalisation, like: Tensor
    ) -> None:
        self.plan, self.shape, self.normalisation = plan, tuple(shape), normalisation
        self.like = like

    def begin(self, draw: Draw) -> None:
        self.image = self._start(draw).requires_grad_()
        self.optimizer = torch.optim.Adam([self.image], self.plan.lr, betas=self.plan.betas)

    def _start(self, draw: Draw) -> Tensor:
        if self.plan.start == "uniform":
            pixels = draw.uniform(self.shape, Stream.START).to(self.like)
            return self.normalisation.to_network(pixels)
        normal = draw.normal(self.shape, Stream.START).to(self.like)
        if self.plan.start == "dark":
            return self.normalisation.to_network(0.15 + 0.1 * normal)
        return normal

    def pictures(self) -> tuple[Tensor, ...]:
        return (self.image,)

    def changed(self) -> list[Tensor]:
        return [self.image]

    def step(self, gradients: Sequence[Tensor]) -> None:
        self.image.grad = gradients[0] / num_workers()
        self.optimizer.step()
        with torch.no_grad():
            self.image.copy_(self._bounded(self.image))

    def _bounded(self, image: Tensor) -> Tensor:
        if self.plan.bounds == "clip":
            return self.normalisation.clipped(image)
        if self.plan.bounds == "stretch":
            pixels = self.normalisation.to_pixels(image)
            ends = gather_rows(torch.stack([pixels.amin(), pixels.amax()])[None])
            least, most = ends[:, 0].amin(), ends[:, 1].amax()
            return self.normalisation.to_network((pixels - least) / (most - least))
        return image

    def end(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def sample(self, draw: Draw) -> Tensor:
        raise RuntimeError(
            "pixels learn nothing that could make other pictures; keep those of each round in a "
            "pool, or choose a generator"
        )
