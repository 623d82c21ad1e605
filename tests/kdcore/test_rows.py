"""gather_rows in one process; test_two_workers.py has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdcore.rows import gather_rows


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 5, 5)])
def test_without_a_process_group_the_rows_are_returned_themselves(shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape)
    assert gather_rows(rows) is rows


def test_a_group_of_one_worker_gathers_its_own_rows(tmp_path: Path) -> None:
    rows = torch.randn(3, 4)
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        assert gather_rows(rows) is rows
    finally:
        dist.destroy_process_group()
