"""Whether the fused student of a run says what the one with branches does, on the test split.

Usage: python tests/benchmarks/fused_predictions.py RUN_FOLDER ... Prints, in both precisions, how
many of the predictions differ and the greatest difference of logits, relative to the greatest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pipelines.build import build_student
from pipelines.config import RunConfig
from pipelines.data import whole
from pipelines.loop import BEST
from pipelines.models import load_weights
from pipelines.sources import read_pictures
from pipelines.strict import validated
from pipelines.students import as_used
from pipelines.train import RESULT


def compare(folder: Path, dtype: torch.dtype) -> str:
    content = json.loads((folder / RESULT).read_text())["run"]
    run = validated(RunConfig, content, where=str(folder))
    trained = build_student(run, read_pictures(run.data, "train")).net
    load_weights(trained, folder / BEST)
    trained = trained.to(dtype).eval()
    fused = as_used(trained)
    before, after = [], []
    with torch.inference_mode():
        for batch in whole(run, read_pictures(run.data, "test")):
            before.append(trained(batch.image.to(dtype)))
            after.append(fused(batch.image.to(dtype)))
    expected, found = torch.cat(before), torch.cat(after)
    other = int((expected.argmax(1) != found.argmax(1)).sum())
    off = float((expected - found).abs().max() / expected.abs().max())
    name = str(dtype).removeprefix("torch.")
    return f"{folder.name} {name}: {other} of {len(found)} predictions differ, logits by {off:.1e}"


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        for dtype in (torch.float32, torch.float64):
            print(compare(folder, dtype), flush=True)
