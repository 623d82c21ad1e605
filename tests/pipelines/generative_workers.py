"""One of two gloo workers: runs of graphical models under DDP beside those of one process.

Usage: python generative_workers.py RANK FOLDER, as ``gloo.py`` calls it. What is measured of a case
are the losses and the weights of its run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipelines.generative.config import GenerativeConfig
from pipelines.generative.inputs import GenerativeInputs
from pipelines.generative.models import build_model
from pipelines.loop import LAST, keep
from pipelines.models import save_weights
from pipelines.strict import validated
from tests.gloo import joined
from tests.pipelines.generative_toys import GOING_ON, STUDENTS

CASES = {
    "distilled ladder": STUDENTS["ladder"],
    "distilled rows, three samples of noise": {**STUDENTS["vrnn"], "distil": {"noise": 3}},
    "ladder from scratch": {**STUDENTS["ladder"], "mode": "scratch"},
    "wake and sleep": {**STUDENTS["eruptions"], "mode": "scratch"},
    "going on": GOING_ON,
}


def fitted(content: dict[str, Any], workers: int, rank: int, folder: Path) -> dict[str, Any]:
    """Losses and weights of a run whose teacher was not trained.

    By plain descent: Adam divides a gradient by its own size, and would show rounding as a step.
    """
    plain = {"name": "sgd", "lr": 1e-5, "momentum": 0, "schedule": {"name": "steps"}}
    changes = {"workers": workers, "epochs": 2, "optimizer": plain}
    run = validated(GenerativeConfig, {**content, **changes}, where="toy")
    kept = folder / "kept"

    def report(metrics: Any, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            keep(checkpoint, kept)

    history = GenerativeInputs(folder / "teacher.safetensors").fit(run, report=report, rank=rank)
    weights = load_file(kept / LAST) if rank == 0 else {}
    losses = [epoch["train/loss"] for epoch in history.history]
    return {"losses": torch.tensor(losses, dtype=torch.float64), "weights": weights}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    measured: dict[str, dict[str, Any]] = {}
    own = {name: folder / f"{name}-{rank}" for name in CASES}
    for name, content in CASES.items():
        own[name].mkdir()
        run = validated(GenerativeConfig, content, where="toy")
        assert run.teacher is not None
        torch.manual_seed(1)
        teacher = build_model(run.teacher.network)
        save_weights(teacher.state_dict(), own[name] / "teacher.safetensors")
        if rank == 0:
            measured[name] = {"one": fitted(content, 1, 0, own[name])}
    with joined(rank, folder, measured):
        for name, content in CASES.items():
            two = fitted(content, 2, rank, own[name])
            if rank == 0:
                measured[name]["two"] = two


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
