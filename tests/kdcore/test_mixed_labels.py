"""Pictures made of two have two labels: who reads both, and who refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdcore.losses import LOSSES
from kdcore.losses.logits import cross_entropy
from kdcore.models import MODELS
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.types import Batch, Mix, Outputs, Probe

OWN, OTHER = torch.tensor([0, 2, 1]), torch.tensor([1, 2, 0])
SHARE = torch.tensor([0.25, 0.5, 1.0])
LOGITS = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 3.0], [0.2, 0.1, 0.0]])


def batch_of(mix: Mix | None) -> Batch:
    return Batch(torch.zeros(3, 1, 8, 8), OWN, torch.arange(3), mix=mix)


MIXED = batch_of(Mix(OTHER, SHARE))


def exactly(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_target_of_a_mixed_picture_is_the_share_of_every_class() -> None:
    exactly(MIXED.target(3), torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    exactly(batch_of(None).target(3), OWN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_is_the_mean_over_both_labels(dtype: torch.dtype) -> None:
    # mixup's own code: lam * criterion(pred, y_a) + (1 - lam) * criterion(pred, y_b)
    logits = LOGITS.to(dtype)
    own, other = (F.cross_entropy(logits, label, reduction="none") for label in (OWN, OTHER))
    expected = (SHARE * own + (1 - SHARE) * other).mean()
    torch.testing.assert_close(cross_entropy(logits, MIXED.target(3)), expected)


def test_label_smoothing_spreads_a_share_of_both_labels() -> None:
    target = 0.9 * MIXED.target(3) + 0.1 / 3
    expected = -(target * F.log_softmax(LOGITS, dim=1)).sum(dim=1).mean()
    smoothed = cross_entropy(LOGITS, MIXED.target(3), label_smoothing=0.1)
    torch.testing.assert_close(smoothed, expected)


def test_a_prediction_of_either_label_is_right_by_its_share() -> None:
    exactly(MIXED.right(torch.tensor([0, 2, 1])), torch.tensor([0.25, 1.0, 1.0]))
    exactly(MIXED.right(torch.tensor([1, 0, 0])), torch.tensor([0.75, 0.0, 0.0]))
    exactly(batch_of(None).right(torch.tensor([0, 1, 1])), torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("named", [True, False])
def test_the_step_weighs_both_labels_whether_a_term_names_cross_entropy_or_not(
    named: bool,
) -> None:
    torch.manual_seed(0)
    student = Tapped(MODELS["convnet"](3, width=1, in_channels=1)).eval()
    probe = Probe(student(MIXED.image), MIXED)
    terms = {"ce": LOSSES["ce"].build({}, {}, probe)} if named else {}
    step = DistillStep(student, terms, dict.fromkeys(terms, 1.0)).eval()
    if not named:
        step = DistillStep(student, {}, {}).eval()
    logits = student(MIXED.image).logits
    expected = cross_entropy(logits, MIXED.target(3))
    torch.testing.assert_close(step(MIXED).parts["ce"], expected)


def test_a_mix_moves_with_its_batch() -> None:
    moved = MIXED.to(torch.device("meta"))
    assert moved.mix is not None
    assert {moved.mix.label.device.type, moved.mix.share.device.type} == {"meta"}


def test_classes_of_the_teacher_need_no_label() -> None:
    said = Outputs(LOGITS, {"embedding": torch.randn(3, 2)})
    batch = Batch(MIXED.image, OWN, MIXED.index, said, mix=MIXED.mix)
    layers = {"embedding": "embedding"}
    value = LOSSES["cw2"].build({"labels": "teacher"}, layers, Probe(said, batch))(
        said, said, batch
    )
    assert bool(value.isfinite())
    refused = LOSSES["cw2"].build({"labels": "true"}, layers, Probe(said, batch))
    with pytest.raises(ValueError, match=r"mixed of two: .* or `labels: teacher`"):
        refused(said, said, batch)
    with pytest.raises(ValueError, match=r"or take a loss without labels$"):
        LOSSES["dkd"].build({}, {}, Probe(said, batch))(said, said, batch)
