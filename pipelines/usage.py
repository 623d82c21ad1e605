"""What training takes of the machine, measured in the process that trains."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil
import torch

_MIB = 2**20


@dataclass
class Meter:
    """Measures its own process from its making on; trials beside it on the machine do not count.

    MLflow's own monitor reads the whole machine's load, in the process that it is started in:
    beside other trials, or in a driver apart from them, that is not what a trial takes.
    """

    device: torch.device
    _wall: float = field(default_factory=time.perf_counter)
    _cpu: float = field(default_factory=time.process_time)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> dict[str, float]:
        """By the names under which MLflow shows them: mean busy cores, memory in MiB.

        Memory is what is resident now, a GPU's the greatest that tensors took since the beginning.
        """
        wall = max(time.perf_counter() - self._wall, 1e-9)
        used = {
            "system/cpu_cores": (time.process_time() - self._cpu) / wall,
            "system/memory_mib": psutil.Process().memory_info().rss / _MIB,
        }
        if self.device.type == "cuda":
            used["system/gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.device) / _MIB
        return used
