"""Where the targets of a model come from: pictures, their rows as sequences, their bits, tables."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.dgm.models.vrnn import strokes
from pipelines.archives import Part
from pipelines.datasets import DataConfig
from pipelines.generative.networks import (
    BeliefConfig,
    HelmholtzConfig,
    LadderConfig,
    NetworkConfig,
    VrnnConfig,
)
from pipelines.generative.tables import TableConfig, read_tables
from pipelines.sources import Pictures, read_pictures, split_rows

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Observations:
    """Rows that a model may learn from, as its targets and inputs by name."""

    rows: np.ndarray  # numbers of the rows, which keep them whatever is left out
    label: np.ndarray  # condition of each row; 0 where there are none
    digest: str
    take: Callable[[np.ndarray], tuple[Tensors, Tensors]]  # row numbers to targets and inputs

    def of_condition(self, condition: int | None) -> np.ndarray:
        """The rows of one condition, or of all."""
        return self.rows if condition is None else self.rows[self.label == condition]


def observations(model: NetworkConfig, data: DataConfig | TableConfig, part: Part) -> Observations:
    """The training or the test part of the data as a model sees it.

    Raises ValueError for data of another kind or shape than the model's.
    """
    if isinstance(data, TableConfig) != isinstance(model, HelmholtzConfig):
        raise ValueError(
            f"model {model.name} learns {_LEARNS[model.name]}, and the data is "
            f"{data.table if isinstance(data, TableConfig) else data.name}"
        )
    if isinstance(data, TableConfig):
        return _of_table(data, part)
    return _of_pictures(model, data, read_pictures(data, part))


def split(seen: Observations, data: DataConfig | TableConfig) -> tuple[np.ndarray, np.ndarray]:
    """Sorted places of a training part that train, and that are held out."""
    return split_rows(len(seen.rows), data.validation, data.split_seed)


def condition_of(index: Tensor, count: int) -> Tensor:
    """A condition for every row that has none of its own, all alike often, one-hot."""
    return F.one_hot(index % count, count).float()


_LEARNS = {
    "ladder_vae": "pictures",
    "vrnn": "the rows of pictures",
    "belief_network": "pictures",
    "helmholtz": "a table of two numbers",
}


def _of_pictures(model: NetworkConfig, data: DataConfig, pictures: Pictures) -> Observations:
    _check_shape(model, pictures.image.shape[1:])
    classes = model.conditions if isinstance(model, LadderConfig) else ()
    condition = np.full(pictures.num_classes, -1 if classes else 0)
    for number, members in enumerate(classes):
        condition[[one for one in members if one < len(condition)]] = number
    label = condition[pictures.label]
    rows = np.flatnonzero(label >= 0)

    def take(chosen: np.ndarray) -> tuple[Tensors, Tensors]:
        image = torch.from_numpy(np.ascontiguousarray(pictures.image[chosen])).float() / 255
        if isinstance(model, VrnnConfig):
            return strokes(_sequences(image, data)), {}
        if isinstance(model, BeliefConfig):
            return {"y": (image.flatten(1) > 0.5).float()}, {}
        held = torch.from_numpy(label[chosen])
        inputs = {"condition": F.one_hot(held, len(classes)).float()} if classes else {}
        return {"y": image}, inputs

    return Observations(rows, label[rows], pictures.digest, take)


def _sequences(image: Tensor, data: DataConfig) -> Tensor:
    """Rows of pixels, normalised, behind a bit: whether a row has more ink than most."""
    steps = image.transpose(1, 2).flatten(2)
    ink = steps.mean(dim=2, keepdim=True)
    bit = (ink > ink.mean(dim=1, keepdim=True)).float()
    return torch.cat([bit, (steps - data.mean[0]) / data.std[0]], dim=2)


def _check_shape(model: NetworkConfig, shape: tuple[int, ...]) -> None:
    channels, height, width = shape
    own: tuple[int, ...]
    if isinstance(model, VrnnConfig):
        own, found = (model.length, model.continuous), (height, channels * width)
        words = "`length` by `continuous`"
    else:
        assert isinstance(model, LadderConfig | BeliefConfig)
        own, found, words = model.image, tuple(shape), "`image`"
    if tuple(own) != tuple(found):
        raise ValueError(f"model.{words} is {tuple(own)}, and the pictures are {found}")


def _of_table(data: TableConfig, part: Part) -> Observations:
    train, test = read_tables(data)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    table = (train if part == "train" else test).astype(np.float64)
    standard = torch.from_numpy((table - mean) / deviation).float()
    content = hashlib.sha256(np.ascontiguousarray(table)).hexdigest()

    def take(chosen: np.ndarray) -> tuple[Tensors, Tensors]:
        held = standard[torch.from_numpy(chosen)]
        return {"y1": held[:, :1], "y2": held[:, 1:]}, {}

    every = np.arange(len(table))
    return Observations(every, np.zeros_like(every), content, take)
