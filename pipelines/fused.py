"""The student of a finished run, fused into its plain network and written by itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines.build import build_student
from pipelines.config import RunConfig
from pipelines.data import Reader
from pipelines.loading import as_yaml
from pipelines.loop import BEST
from pipelines.models import build_network, load_weights, save_weights
from pipelines.networks import ModelConfig
from pipelines.sources import Pictures, read_pictures
from pipelines.strict import validated
from pipelines.students import as_used
from pipelines.train import RESULT

WEIGHTS, CONFIG = "student.safetensors", "student.yaml"
TOLERANCE = 5e-6  # in float32, of the greatest logit: what summing in another order costs


@dataclass(frozen=True)
class Fused:
    """A fused student, and how near it is to the one it was made of."""

    folder: Path
    pictures: int  # of the validation split, on which both were run
    difference: float  # greatest of the logits', relative to the greatest logit
    parameters: tuple[int, int]  # before and after


def fuse_checkpoint(checkpoint: Path) -> Fused:
    """Write the best student of a run, fused, into ``fused/`` of the run's folder.

    ``checkpoint`` is that folder or a file in it. The weights load into the plain network.

    Raises ValueError where there is no finished run or nothing to fuse, and, before anything is
    written, where the two differ on the validation pictures.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if checkpoint.is_file() and checkpoint.name != BEST:
        raise ValueError(f"expected a run's folder or its {BEST}, got {checkpoint.name}")
    run = _run_of(folder)
    if run.student.branches is None and run.student.expand is None:
        raise ValueError(f"run {run.name!r} has a student without branches: nothing to fuse")
    pictures = read_pictures(run.data, "train")
    trained = build_student(run, pictures).net
    load_weights(trained, folder / BEST)
    fused = as_used(trained)
    difference, count = _compared(run, pictures, trained.eval(), fused)
    _check_plain(run, pictures, fused)
    written = _written(run, pictures, fused, folder.absolute() / "fused")
    return Fused(written, count, difference, (_size(trained), _size(fused)))


def _run_of(folder: Path) -> RunConfig:
    if not (folder / RESULT).is_file():
        raise ValueError(f"no finished run in {folder}: it has no {RESULT}")
    content = json.loads((folder / RESULT).read_text())["run"]
    return validated(RunConfig, content, where=str(folder / RESULT))


@torch.inference_mode()
def _compared(
    run: RunConfig, pictures: Pictures, trained: nn.Module, fused: nn.Module
) -> tuple[float, int]:
    pairs: list[tuple[Tensor, Tensor]] = [
        (trained(batch.image), fused(batch.image)) for batch in Reader(run, pictures).validation()
    ]
    before, after = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    difference = float((after - before).abs().max() / before.abs().max())
    changed = int((after.argmax(1) != before.argmax(1)).sum())
    if changed or not difference <= TOLERANCE:
        raise ValueError(
            f"the fused student differs by {difference:.2g} of the greatest logit (expected at "
            f"most {TOLERANCE:g}) and in {changed} of {len(before)} predictions; nothing is written"
        )
    return difference, len(before)


def _check_plain(run: RunConfig, pictures: Pictures, fused: nn.Module) -> None:
    channels = pictures.image.shape[1]
    plain = build_network(_plain(run, None), num_classes=pictures.num_classes, in_channels=channels)
    gained = [name for name in fused.state_dict() if name not in plain.state_dict()]
    if gained:
        raise ValueError(
            f"the fused student has {', '.join(gained)}, which the plain {run.student.name} has "
            "not; train with `branches: {batch_norm: false}`"
        )


def _plain(run: RunConfig, weights: Path | None) -> ModelConfig:
    fields = run.student.model_dump(include=set(ModelConfig.model_fields))
    return ModelConfig(**fields | {"weights": weights})


def _written(run: RunConfig, pictures: Pictures, fused: nn.Module, folder: Path) -> Path:
    """The weights, and then what they are of: a teacher as a run's configuration names it."""
    folder.mkdir(exist_ok=True)
    save_weights(fused.state_dict(), folder / WEIGHTS)
    content = {
        "teacher": _plain(run, folder / WEIGHTS).model_dump(mode="json"),
        "num_classes": pictures.num_classes,
        "in_channels": pictures.image.shape[1],
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "fused_from": folder.parent.name,
    }
    (folder / CONFIG).write_text(as_yaml(content))
    return folder


def _size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
