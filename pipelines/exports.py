"""A network in the forms that other programs run: torch.export and ONNX, checked against torch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

PROGRAM, ONNX = "student.pt2", "student.onnx"
# of the greatest logit: other kernels add in another order, which differs by some 1e-6 in float32
TOLERANCE = 1e-4


def exported(net: nn.Module, example: np.ndarray, folder: Path) -> list[Path]:
    """Write a network in evaluation mode as ``student.pt2`` and ``student.onnx``, or neither.

    ``example`` is (B, C, H, W) uint8 with B >= 2; the written forms take any B.

    Raises ValueError where a form cannot be made, or gives other logits than the network for the
    example or for its first picture alone.
    """
    net, image = net.cpu().eval(), torch.from_numpy(example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            batch = {0: torch.export.Dim("batch")}
            program = torch.export.export(net, (image,), dynamic_shapes=(batch,))
            torch.export.save(program, folder / PROGRAM)
            converted = torch.onnx.export(program, dynamo=True, verbose=False)
            assert converted is not None  # it is, where no file is named
            converted.save(folder / ONNX)
            forms = {PROGRAM: _program(folder), ONNX: _session(folder)}
        for (form, run), some in itertools.product(forms.items(), (image, image[:1])):
            _check(net, run, some, form)
    except Exception as error:  # the exporters raise anything
        for form in (PROGRAM, ONNX):
            (folder / form).unlink(missing_ok=True)
        first = str(error).strip().splitlines()[:1]
        raise ValueError(f"cannot export {type(net).__name__}: {' '.join(first)}") from error
    return [folder / PROGRAM, folder / ONNX]


def _program(folder: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(folder / PROGRAM).module()


def _session(folder: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # paid for only by who exports

    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {taken.name: image.numpy()})[0])

    return run


@torch.inference_mode()
def _check(net: nn.Module, run: Callable[[Tensor], Tensor], image: Tensor, form: str) -> None:
    expected, found = net(image), run(image)
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= TOLERANCE:
        raise ValueError(
            f"{form} gives other logits than the network: {off:.2g} of the greatest, at most "
            f"{TOLERANCE:g} expected"
        )
