"""BatchNorm beside torch's own; test_two_workers.py has its gradient over two processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kdcore.batch_norm
from kdcore.batch_norm import BatchNorm


def both() -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours and torch's with the same scale, shift and state dict."""
    reference = nn.BatchNorm2d(3).double()
    nn.init.normal_(reference.weight)
    nn.init.normal_(reference.bias)
    ours = BatchNorm(3).double()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def measure(norm: nn.Module, maps: Tensor) -> dict[str, Tensor]:
    """The output, the gradient of a weighted sum of it, and what the module has become."""
    asking = maps.clone().requires_grad_()
    out = norm(asking)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    assert asking.grad is not None
    gradients = {name: held.grad for name, held in norm.named_parameters()}
    return {"out": out.detach(), "in": asking.grad, **norm.state_dict(prefix="is."), **gradients}


def test_in_training_and_evaluation_it_is_torch_s() -> None:
    ours, reference = both()
    for training in (True, True, False):
        ours.train(training), reference.train(training)
        maps = 3 * torch.randn(4, 3, 2, 5, dtype=torch.float64) + 1
        torch.testing.assert_close(measure(ours, maps), measure(reference, maps))


def test_over_workers_it_is_torch_s_of_all_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # a second worker with the same rows; the real thing is in two_workers.py
    monkeypatch.setattr(kdcore.batch_norm, "num_workers", lambda: 2)
    monkeypatch.setattr(kdcore.batch_norm, "gather_rows", lambda rows: torch.cat([rows, rows]))
    ours, reference = both()
    maps = 3 * torch.randn(4, 3, 2, 5, dtype=torch.float64) + 1
    torch.testing.assert_close(ours(maps), reference(torch.cat([maps, maps]))[:4])
    torch.testing.assert_close(ours.state_dict(), reference.state_dict())


def test_a_dead_channel_gives_its_shift_and_a_finite_gradient() -> None:
    ours, _ = both()
    measured = measure(ours, torch.zeros(4, 3, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(measured["out"], ours.bias[:, None, None].expand(4, 3, 2, 2))
    assert bool(measured["in"].isfinite().all())


def test_one_number_per_channel_is_refused_in_training() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm(3)(torch.randn(1, 3, 1, 1))
