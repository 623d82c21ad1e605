"""Where the targets of a model come from: pictures, their rows as sequences, their bits, tables."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.dgm.models.vrnn import strokes
from pipelines.archives import Part
from pipelines.config import DataConfig
from pipelines.generative.config import TableConfig
from pipelines.generative.networks import (
    BeliefConfig,
    HelmholtzConfig,
    LadderConfig,
    NetworkConfig,
    VrnnConfig,
)
from pipelines.sources import Pictures, read_pictures, split_rows

Tensors = Mapping[str, Tensor]
_TEST_EVERY = 5  # rows of a user's table

# the mixture that EM finds in the 272 eruptions of Old Faithful (Azzalini & Bowman 1990), R's
# `faithful`: shares, means and covariances of (duration in minutes, waiting in minutes)
_SHARES = (0.3559, 0.6441)
_MEANS = ((2.0364, 54.4785), (4.2897, 79.9681))
_COVARIANCES = (((0.0692, 0.4352), (0.4352, 33.6973)), ((0.1700, 0.9406), (0.9406, 36.0462)))


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
    train, test = _tables(data)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    table = (train if part == "train" else test).astype(np.float64)
    standard = torch.from_numpy((table - mean) / deviation).float()
    content = hashlib.sha256(np.ascontiguousarray(table)).hexdigest()

    def take(chosen: np.ndarray) -> tuple[Tensors, Tensors]:
        held = standard[torch.from_numpy(chosen)]
        return {"y1": held[:, :1], "y2": held[:, 1:]}, {}

    every = np.arange(len(table))
    return Observations(every, np.zeros_like(every), content, take)


def _tables(data: TableConfig) -> tuple[np.ndarray, np.ndarray]:
    """The training and the test rows: of a file every fifth, of drawn ones as many again."""
    if data.table == "eruptions":
        first, second = (
            _eruptions(np.random.default_rng([data.seed, part]), data.rows) for part in (0, 1)
        )
        return first, second
    table = _read_csv(Path(data.table))
    tests = np.arange(len(table)) % _TEST_EVERY == 0
    return table[~tests], table[tests]


def _eruptions(random: np.random.Generator, count: int) -> np.ndarray:
    """Two clusters like those of Old Faithful's eruptions: short ones come soon, long ones late."""
    cluster = random.choice(len(_SHARES), size=count, p=_SHARES)
    drawn = [random.multivariate_normal(_MEANS[one], _COVARIANCES[one]) for one in cluster]
    return np.array(drawn)


def _read_csv(path: Path) -> np.ndarray:
    """The first two columns of a file with a header."""
    try:
        with path.open(newline="") as file:
            lines = list(csv.reader(file))[1:]
        table = np.array([[float(cell) for cell in line[:2]] for line in lines if line])
    except OSError as error:
        raise ValueError(f"data.table: {path}: {error.strerror}; or `eruptions`") from None
    except ValueError as error:
        raise ValueError(f"data.table: {path} is no table of numbers: {error}") from None
    if table.ndim != 2 or table.shape[1] != 2 or len(table) < 2 * _TEST_EVERY:
        raise ValueError(f"data.table: {path} needs two columns and ten rows, has {table.shape}")
    return table
