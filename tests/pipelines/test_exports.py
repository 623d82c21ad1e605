"""Students in the forms that other programs run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from kdcore.models import MODELS
from pipelines.exports import ONNX, exported
from pipelines.models import Served

GREY = {"mean": (0.5,), "std": (0.25,)}


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)


class Unlike(nn.Module):
    """Another network under the exporter than under torch."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(64, 3)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(image.float().flatten(1))
        return logits + 1 if torch.compiler.is_exporting() else logits


class Choosing(nn.Module):
    """What it computes depends on the numbers."""

    def forward(self, image: Tensor) -> Tensor:
        return image.float().mean(dim=(2, 3)) if image.float().mean() > 1 else image.float().sum()


def test_an_exported_student_gives_its_logits_for_any_number_of_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Served(MODELS["convnet"](3, 1, width=2), **GREY).eval()
    paths = exported(student, pixels(2), tmp_path)
    assert [path.name for path in paths] == ["student.pt2", "student.onnx"]
    image = pixels(7)
    expected = student(torch.from_numpy(image)).detach()
    program = torch.export.load(tmp_path / "student.pt2").module()
    torch.testing.assert_close(program(torch.from_numpy(image)).detach(), expected)
    session = onnxruntime.InferenceSession(tmp_path / ONNX, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_a_form_that_gives_other_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student\.pt2 gives other logits than the network: \d"):
        exported(Unlike(), pixels(2), tmp_path)


def test_a_network_that_cannot_be_exported_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot export Choosing: "):
        exported(Choosing(), pixels(2), tmp_path)
