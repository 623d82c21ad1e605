"""What a model generates, beside its teacher and beside data: how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore.dgm.evaluation import Features, generation_distances, values_as_features
from kdcore.dgm.row_noise import RowNoise
from kdcore.dgm.trace import Trace
from kdcore.metrics.two_samples import sample_distances
from kdcore.taps import Tapped
from pipelines.generative.config import DistancesConfig, GenerativeConfig
from pipelines.generative.models import Model, posterior_means, shown_as
from pipelines.generative.networks import LadderConfig, NetworkConfig
from pipelines.generative.observations import Tensors, condition_of
from pipelines.models import build_network, load_weights

# uses of noise, which share no number
TRAINED, HELD_OUT, SAMPLED, COMPARED, SEEN, DRAWN, KEPT = range(7)


def noise_of(run: GenerativeConfig, rows: Tensor, *, use: int, epoch: int = 0) -> RowNoise:
    """The noise of some rows of a run."""
    return RowNoise(rows, epoch=epoch, seed=run.seed, use=use)


def conditions(model: NetworkConfig, rows: Tensor, only: int | None = None) -> Tensors:
    """What rows without data are conditioned on: nothing, one condition, or each as often."""
    count = len(model.conditions) if isinstance(model, LadderConfig) else 0
    if not count:
        return {}
    return {"condition": condition_of(rows if only is None else rows * 0 + only, count)}


@dataclass(frozen=True)
class Compared:
    """Held-out data, and the condition under which a model generates its like."""

    targets: Tensors
    condition: int | None = None


@dataclass(frozen=True)
class Judge:
    """Measures a generator against its teacher, and against data by name where there are any."""

    run: GenerativeConfig
    teacher: Model | None
    data: Mapping[str, Compared]
    device: torch.device

    def of_epoch(self, generator: nn.Module) -> dict[str, float]:
        """``val/...``: one sample against the teacher's or, without a teacher, against data."""
        reference = self._reference
        # no row of the teacher's sample: shared noise would make pairs of the two
        rows = self._rows(len(reference), len(reference))
        sample = self._sample(generator, rows, self.run.old_condition)
        found = sample_distances(self._features(sample), reference)
        return {f"val/{name}": held for name, held in found.items()}

    def of_run(self, generator: nn.Module) -> dict[str, float]:
        """``samples/...``: every comparison, and the floor of one sample against another.

        "teacher_NAME" is the teacher against data of a name. A model without a teacher is its own.
        """
        taught = generator if self.teacher is None else self.teacher.generator
        rows = self._rows(0, self.run.distances.rows)
        found = generation_distances(
            taught,
            generator,
            len(rows),
            features=self._features,
            targets=shown_as(self.run.model),
            inputs=conditions(self.run.model, rows, self.run.old_condition),
            paired=self.run.distances.paired and self._may_pair,
            generator=noise_of(self.run, rows, use=COMPARED),
        )
        for name, held in self.data.items():
            found |= self._from_data(name, generator, held)
            if self.teacher is not None:
                found |= self._from_data(f"teacher_{name}", taught, held)
        unsaid = () if self.teacher else ("teacher/", "paired/")
        return {f"samples/{name}": v for name, v in found.items() if not name.startswith(unsaid)}

    def _from_data(self, name: str, generator: nn.Module, held: Compared) -> dict[str, float]:
        count = min(self.run.distances.rows, *(len(value) for value in held.targets.values()))
        real = self._features({key: value[:count] for key, value in held.targets.items()})
        sample = self._sample(generator, self._rows(count, count), held.condition)
        found = sample_distances(self._features(sample), real)
        return {f"{name}/{key}": value for key, value in found.items()}

    @property
    def _may_pair(self) -> bool:
        return self.run.distil.match is None and not self.run.distil.noise_map

    @cached_property
    def _reference(self) -> Tensor:
        count = self.run.distances.rows
        if self.teacher is None:
            data = next(iter(self.data.values()))
            return self._features({name: held[:count] for name, held in data.targets.items()})
        rows = self._rows(0, count)
        return self._features(self._sample(self.teacher.generator, rows, self.run.old_condition))

    @cached_property
    def _features(self) -> Features:
        how = self.run.distances
        if how.features == "network":
            return _of_network(how, self.device)
        if how.features == "teacher":
            return self._of_teacher
        return values_as_features

    def _of_teacher(self, targets: Mapping[str, Tensor]) -> Tensor:
        assert self.teacher is not None
        rows = self._rows(0, len(next(iter(targets.values()))))
        noise = noise_of(self.run, rows, use=SEEN)
        with torch.no_grad():
            layer = self.run.distances.layer
            return posterior_means(self.teacher, targets, {}, layer=layer, noise=noise)

    def _sample(self, generator: nn.Module, rows: Tensor, condition: int | None) -> Tensors:
        trace = Trace(
            len(rows),
            inputs=conditions(self.run.model, rows, condition),
            targets=shown_as(self.run.model),
            generator=noise_of(self.run, rows, use=SAMPLED),
        )
        with torch.no_grad():
            generator(trace)
        values = trace.values("target")
        if not all(bool(torch.isfinite(held).all()) for held in values.values()):
            raise FloatingPointError("a sample is not finite; lower optimizer.lr")
        return values

    def _rows(self, first: int, count: int) -> Tensor:
        return torch.arange(first, first + count, device=self.device)


def _of_network(how: DistancesConfig, device: torch.device) -> Features:
    """A named layer of a network of pictures, pooled over positions if the layer says so."""
    assert how.network is not None
    assert how.network.weights is not None
    layer = str(how.layer)
    net = build_network(
        how.network.model_copy(update={"weights": None}), num_classes=how.classes, in_channels=3
    )
    load_weights(net, how.network.weights)
    tapped = Tapped(net.to(device).eval(), [layer])
    mean, deviation = (
        torch.tensor(numbers, device=device).reshape(-1, 1, 1) for numbers in (how.mean, how.std)
    )

    def features(targets: Mapping[str, Tensor]) -> Tensor:
        image = targets["y"].clamp(0, 1)
        if how.size is not None:
            image = F.interpolate(image, (how.size, how.size), mode="bilinear", antialias=True)
        with torch.no_grad():
            seen = tapped((image.expand(-1, 3, -1, -1) - mean) / deviation)
        return seen.features[layer].flatten(1)

    return features
