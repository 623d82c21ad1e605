"""One training step with torchdistill's losses, for step_cost.py to run beside ours.

Needs torchdistill (the extra `bench`). Its own hooks collect what its own loss module compares; the
auxiliary layers that its wrappers would add stand here as plain modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdistill.core.forward_hook import ForwardHookManager
from torchdistill.losses import mid_level as losses
from torchdistill.models.wrapper import (
    AttentionBasedFusion,
    Normalizer4CRD,
    Paraphraser4FactorTransfer,
    Regressor4VID,
    Translator4FactorTransfer,
)

from kdcore.types import Batch

STAGES = {"layer1": 64, "layer2": 128, "layer3": 256}  # with their channels, in both networks
EMBEDDING, LOGITS = {"path": "linear", "io": "input"}, ("linear", "output", "linear", "output")
PAIRS = {
    stage: {name: {"path": stage, "io": "output"} for name in ("student", "teacher")}
    for stage in STAGES
}
NEGATIVES = 16384
# of knowledge review, the deepest first, with channels and resolution
LEVELS = {"pooled": (256, 1), "layer3": (256, 8), "layer2": (128, 16), "layer1": (64, 32)}
IO = dict[str, dict[str, Any]]


def flow_pairs() -> Mapping[str, Any]:
    return {
        f"{first}-{second}": {
            f"{network}_{place}": {"path": stage, "io": "output"}
            for network in ("student", "teacher")
            for place, stage in (("first", first), ("second", second))
        }
        for first, second in (("layer1", "layer2"), ("layer2", "layer3"))
    }


def variational_pairs() -> Mapping[str, Any]:
    return {
        stage: {
            "student": {"path": f"regressor.{stage}", "io": "output"},
            "teacher": {"path": stage, "io": "output"},
        }
        for stage in STAGES
    }


class Auxiliary(nn.Module):
    """Layers that torchdistill puts behind the hooked ones, of one network."""

    def __init__(
        self, layers: Mapping[str, nn.Module], source: Callable[[IO, str], Tensor]
    ) -> None:
        super().__init__()
        self.layers, self.source = nn.ModuleDict(layers), source

    def extend(self, io: IO) -> None:
        for name, layer in self.layers.items():
            io[name.replace("/", ".")] = {"output": layer(self.source(io, name))}


class Review(nn.Module):
    """Each map of the student's with all deeper ones, as its wrapper for knowledge review does."""

    def __init__(self) -> None:
        super().__init__()
        self.fusions = nn.ModuleList(
            AttentionBasedFusion(width, 256, width, uses_attention=place > 0)
            for place, (width, _) in enumerate(LEVELS.values())
        )

    def extend(self, io: IO) -> None:
        deeper = None
        for (level, (_, size)), fuse in zip(LEVELS.items(), self.fusions, strict=True):
            out, deeper = fuse(io[level]["output"], deeper, size)
            io[f"fused.{level}"] = {"output": (out, deeper)}


class ReviewLoss(nn.Module):
    """The sum over levels, which its configurations write as a sum of four losses."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            losses.HierarchicalContextLoss(f"fused.{level}", "output", level, "output")
            for level in LEVELS
        )

    def forward(self, *said: Any) -> Tensor:
        return torch.stack([part(*said) for part in self.parts]).sum()


LOSSES: Mapping[str, Callable[[int], nn.Module]] = {
    "kd": lambda rows: losses.KDLoss(*LOGITS, temperature=4.0, alpha=0.5),
    "lskd": lambda rows: losses.LogitStdKDLoss(*LOGITS, temperature=2.0, alpha=0.5),
    "dist": lambda rows: losses.DISTLoss(*LOGITS),
    "at": lambda rows: losses.ATLoss(PAIRS),
    "fsp": lambda rows: losses.FSPLoss(flow_pairs()),
    "ab": lambda rows: losses.AltActTransferLoss(PAIRS, margin=1.0, reduction="mean"),
    "ickd": lambda rows: losses.ChSimLoss(PAIRS),
    "pkt": lambda rows: losses.PKTLoss("embedding", "output", "embedding", "output"),
    "rkd": lambda rows: losses.RKDLoss("embedding", "embedding", 25.0, 50.0, "mean"),
    "sp": lambda rows: losses.SPKDLoss("embedding", "embedding", "batchmean"),
    "cc": lambda rows: losses.CCKDLoss(
        "code", "code", {"type": "gaussian", "gamma": 0.4, "max_p": 2}, "batchmean"
    ),
    "vid": lambda rows: losses.VIDLoss(variational_pairs()),
    "ft": lambda rows: losses.FTLoss(paraphraser_path="paraphraser", translator_path="translator"),
    "reviewkd": lambda rows: ReviewLoss(),
    "crd": lambda rows: losses.CRDLoss("code", "empty", "code", 128, rows, NEGATIVES, rows),
}


def auxiliary(key: str) -> tuple[nn.Module, nn.Module]:
    """What is trained beside the student, behind the hooks of student and teacher."""

    def embedding(io: IO, name: str) -> Tensor:
        return io["linear"]["input"].flatten(1)

    def code(layer: nn.Module) -> Auxiliary:
        return Auxiliary({"code": layer}, embedding)

    def deepest(io: IO, name: str) -> Tensor:
        return io["layer3"]["output"]

    if key == "reviewkd":
        return Review(), Auxiliary({}, embedding)
    if key == "ft":  # its second stage, in which the paraphraser is trained no more
        paraphraser = Paraphraser4FactorTransfer(0.5, 256, uses_decoder=False)
        there = Auxiliary({"paraphraser": paraphraser.requires_grad_(False)}, deepest)
        return Auxiliary({"translator": Translator4FactorTransfer(256, 128)}, deepest), there
    if key == "cc":
        return code(nn.Linear(256, 128)), code(nn.Linear(256, 128))
    if key == "crd":
        here, there = (Normalizer4CRD(nn.Linear(256, 128)) for _ in range(2))
        return code(here), code(there)
    if key == "vid":
        regressors = {
            f"regressor/{stage}": Regressor4VID(width, width, width, 1e-5, 5.0)
            for stage, width in STAGES.items()
        }
        here = Auxiliary(regressors, lambda io, name: io[name.partition("/")[2]]["output"])
        return here, Auxiliary({}, embedding)
    return Auxiliary({}, embedding), Auxiliary({}, embedding)


def hooked(net: nn.Module) -> ForwardHookManager:
    hooks = ForwardHookManager(torch.device("cpu"))
    for path in (*STAGES, "linear"):
        hooks.add_hook(net, path)
    return hooks


def online_loss(
    key: str, student: nn.Module, teacher: nn.Module, batch: Batch, *, rows: int
) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """What is trained, and the loss of one step with a live teacher, cross-entropy included."""
    distance, (here, there) = LOSSES[key](rows), auxiliary(key)
    hooks = hooked(student), hooked(teacher.eval())

    def loss() -> Tensor:
        logits = student(batch.image)
        with torch.no_grad():
            teacher(batch.image)
        said = [manager.pop_io_dict() for manager in hooks]
        for io, layers in zip(said, (here, there), strict=True):
            io["embedding"] = {"output": io["linear"]["input"]}
            io["pooled"] = {"output": io["linear"]["input"][..., None, None]}
            layers.extend(io)
        # 1.1.5 fails where it draws these itself: CRDLoss.draw asks for `prob`, which is `probs`
        noise = torch.randint(rows, (len(logits), NEGATIVES + 1)) if key == "crd" else None
        said[0]["empty"] = {"input": {"pos_idx": batch.index, "contrast_idx": noise}}
        total: Tensor = distance(*said, batch.label).sum() + F.cross_entropy(logits, batch.label)
        return total

    return [*student.parameters(), *here.parameters(), *there.parameters()], loss
