"""What training takes of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from pipelines.usage import Meter

CPU = torch.device("cpu")
# another process that keeps a core busy, as a trial beside this one does
BUSY = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


def test_only_this_process_s_own_work_counts() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY]) as other:
        before, meter = os.times(), Meter(CPU)
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        used, after = meter.read(), os.times()
        other.kill()
    spent = after.user + after.system - before.user - before.system
    wall = after.elapsed - before.elapsed
    assert used["system/cpu_cores"] == pytest.approx(spent / wall, rel=0.2)


def test_a_process_that_waits_takes_no_core() -> None:
    meter = Meter(CPU)
    time.sleep(0.2)
    assert meter.read()["system/cpu_cores"] < 0.5


def test_memory_is_what_is_resident() -> None:
    before = Meter(CPU).read()["system/memory_mib"]
    held = np.ones(32 * 2**20, dtype=np.float64)  # 256 MiB, written to
    used = Meter(CPU).read()["system/memory_mib"]
    assert used - before == pytest.approx(held.nbytes / 2**20, rel=0.1)
    assert used == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_s_memory_is_the_greatest_since_the_beginning() -> None:
    device = torch.device("cuda")
    meter = Meter(device)
    torch.ones(2**26, device=device).sum()
    assert meter.read()["system/gpu_memory_mib"] >= 256
    assert Meter(device).read()["system/gpu_memory_mib"] < 256
