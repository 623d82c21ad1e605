"""Tables of two numbers: drawn eruptions, or a user's file."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from pipelines.strict import Strict

_TEST_EVERY = 5  # rows of a user's table

# the mixture that EM finds in the 272 eruptions of Old Faithful (Azzalini & Bowman 1990), R's
# `faithful`: shares, means and covariances of (duration in minutes, waiting in minutes)
_SHARES = (0.3559, 0.6441)
_MEANS = ((2.0364, 54.4785), (4.2897, 79.9681))
_COVARIANCES = (((0.0692, 0.4352), (0.4352, 33.6973)), ((0.1700, 0.9406), (0.9406, 36.0462)))


class TableConfig(Strict):
    """Rows of two numbers: ``eruptions`` are drawn, anything else is a CSV file with a header."""

    table: str
    rows: PositiveInt = 272  # of drawn eruptions: as many as Old Faithful's
    seed: NonNegativeInt = 0
    validation: float = Field(default=0.2, gt=0, lt=1)
    split_seed: NonNegativeInt = 0


def read_tables(data: TableConfig) -> tuple[np.ndarray, np.ndarray]:
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
