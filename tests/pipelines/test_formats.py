"""Logits in fewer bytes: how far they are off, what is exact, and who may read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kdcore.losses.logits import kd, sparse_kd
from kdcore.types import Outputs
from pipelines.build import checked
from pipelines.cache.columns import logits_column, part_arrays, to_parquet
from pipelines.config import RunConfig
from pipelines.formats import LogitsFormat, TopConfig, check_readable
from pipelines.sources import Pictures
from pipelines.strict import validated

NUM, CLASSES = 200, 100


def teacher(classes: int = CLASSES) -> tuple[torch.Tensor, np.ndarray]:
    """Logits of a sure teacher, one class far above the others, and labels of which some differ."""
    drawn = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(NUM, classes, generator=drawn)
    label = torch.randint(classes, (NUM,), generator=drawn)
    logits[torch.arange(NUM), label] += 8 * (torch.arange(NUM) % 4 > 0)
    return logits, label.numpy()


def kept(logits: torch.Tensor, label: np.ndarray, form: LogitsFormat) -> tuple[torch.Tensor, float]:
    """The logits as a cache gives them back, and its bytes a row."""
    column = logits_column(form)
    content = to_parquet(pa.table(column.encoded(Outputs(logits, {}), label)))
    parts = part_arrays(pq.read_table(pa.BufferReader(content)))
    pictures = Pictures(np.zeros((len(label), 1, 1, 1), np.uint8), label, logits.shape[1])
    rows = column.rows(parts, pictures)[np.arange(len(label))]
    return torch.from_numpy(rows.astype(np.float32)), content.size / len(label)


def distance(here: torch.Tensor, there: torch.Tensor, temperature: float) -> float:
    """Mean L1 distance of the softened predictions."""
    p, q = (held.div(temperature).softmax(dim=1) for held in (here, there))
    return (p - q).abs().sum(dim=1).mean().item()


# the bytes are those of random numbers, with the header of a file of 200 rows
@pytest.mark.parametrize(
    ("form", "temperature", "most", "most_bytes"),
    [
        ("float16", 1, 1e-3, 220),
        ("float16", 4, 3e-4, 220),
        ("uint8", 1, 0.01, 125),
        ("uint8", 4, 0.01, 125),
    ],
)
def test_dense_formats_are_as_exact_as_they_are_large(
    form: LogitsFormat, temperature: float, most: float, most_bytes: float
) -> None:
    logits, label = teacher()
    back, num_bytes = kept(logits, label, form)
    assert distance(back, logits, temperature) < most
    assert num_bytes < most_bytes


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    logits, label = teacher()
    back, _ = kept(logits, label, "uint8")
    step = (logits.amax(1) - logits.amin(1)) / 255
    assert bool(((back - logits).abs() <= 0.51 * step[:, None] + 0.01).all())
    same, _ = kept(torch.full((3, 5), 2.0), np.zeros(3, np.int64), "uint8")
    torch.testing.assert_close(same, torch.full((3, 5), 2.0), rtol=0, atol=0)


@pytest.mark.parametrize("top", [1, 10, 99, 100])
def test_the_greatest_the_label_s_and_all_mass_are_exact(top: int) -> None:
    logits, label = teacher()
    logits = logits.half().float()
    back, _ = kept(logits, label, TopConfig(top=top))
    for row in range(NUM):
        best = logits[row].topk(top).indices
        torch.testing.assert_close(back[row, best], logits[row, best], rtol=0, atol=0)
        torch.testing.assert_close(back[row, label[row]], logits[row, label[row]], rtol=0, atol=0)
    torch.testing.assert_close(back.logsumexp(1), logits.logsumexp(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("top", [1, 10])
def test_sparse_kd_is_the_same_from_what_is_kept(top: int) -> None:
    logits, label = teacher()
    logits = logits.half().float()
    back, _ = kept(logits, label, TopConfig(top=top))
    student = torch.randn(NUM, CLASSES)
    here, there = (
        sparse_kd(student, held, torch.from_numpy(label), kept=top) for held in (back, logits)
    )
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)
    # and kd is not: the others' shares are lost
    assert abs(kd(student, back) - kd(student, logits)) > 0.01


def test_class_numbers_are_right_beyond_sixteen_bits() -> None:
    logits = torch.zeros(2, 70_000)
    logits[0, 65_537], logits[1, 69_999] = 9.0, 8.0
    back, _ = kept(logits, np.array([1, 2]), TopConfig(top=1))
    assert back.argmax(dim=1).tolist() == [65_537, 69_999]


def run_of(logits: Any, losses: dict[str, Any]) -> RunConfig:
    content = {
        "student": {"name": "convnet"},
        "teacher": {
            "run": {
                "student": {"name": "convnet"},
                "data": {"name": "digits"},
                "epochs": 1,
                "losses": {"ce": {}},
            },
            "logits": logits,
        },
        "data": {"name": "digits"},
        "epochs": 1,
        "losses": losses,
    }
    return validated(RunConfig, content, where="toy")


SOFT: dict[str, Any] = {
    "kd": {"kd": {}},
    "a schedule that rises above 1": {"kd": {"params": {"temperature": {"cosine": [1, 3]}}}},
    "several temperatures": {"mlkd": {}},
    "a learned temperature": {"ctkd": {}},
    "a power below 1": {"ttm": {}},
}


@pytest.mark.parametrize("losses", SOFT.values(), ids=SOFT)
def test_few_logits_are_refused_to_what_softens_them(losses: dict[str, Any]) -> None:
    (label,) = losses
    with pytest.raises(ValueError, match=rf"^teacher: losses\.{label} softens .* of 10 classes"):
        checked(run_of({"top": 3}, losses))
    for form in ("uint8", {"top": 3, "force": True}):
        checked(run_of(form, losses))


def test_few_logits_suffice_at_temperature_one_or_for_features_or_of_many_classes() -> None:
    checked(run_of({"top": 3}, {"kd": {"params": {"temperature": 1}}}))
    checked(run_of({"top": 3}, {"sparse_kd": {"params": {"kept": 3}}, "mse": {}, "ce": {}}))
    soft = run_of({"top": 3}, {"kd": {}}).losses
    check_readable(TopConfig(top=3), soft, num_classes=1000)
    with pytest.raises(ValueError, match="softens"):
        check_readable(TopConfig(top=3), soft, num_classes=999)


def test_more_logits_than_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^teacher: logits\.top is 11, and there are 10 classes"):
        checked(run_of({"top": 11}, {"mse": {}}))
