"""CPU time of one training step per loss: online, from a cache, and beside the student alone.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/step_cost.py [ROUNDS [LOSS ...]]. ResNet-32x4 to
ResNet-8x4, 64 pictures of 32x32, one thread, float32, forward, backward and SGD. Every round runs
the plain student's step, a plain torch loop of kd, and each loss once each way, so that what else
the machine does meets all; the median over rounds of the ratio within a round is printed. Where
torchdistill is installed (the extra `bench`), its loss of the same name runs in the same rounds.
What it prints is kept in results/step_cost.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore.losses import LOSSES
from kdcore.models import MODELS
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.teachers import freeze, teacher_outputs
from kdcore.types import Batch, Outputs, Probe
from pipelines.data import TeacherRows
from pipelines.tracking import commit

ROWS, CLASSES, DATASET = 64, 100, 50_000
STAGES = ("layer1", "layer2", "layer3")
LAYERS = {stage: stage for stage in STAGES}
LAST = {"layer3": "layer3"}
# the layers of the published runs, where they are not the ends of all stages
PUBLISHED: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("cat_kd", "diffkd", "ft", "mgd", "norm", "simkd", "wkd_f"), LAST),
    "fitnet": {"layer2": "layer2"},
    "reviewkd": {**LAYERS, "embedding": "embedding"},
}
ASKED = {
    **dict.fromkeys(("kd", "dkd", "dist", "lskd"), 1.03),
    **dict.fromkeys(("at", "fitnet", "rkd", "sp", "pkt"), 1.10),
    "crd": 1.25,
    "reviewkd": 2.0,
}
Step = Callable[[], None]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](CLASSES)


def pictures() -> Batch:
    image = torch.randn(ROWS, 3, 32, 32)
    return Batch(image, torch.arange(ROWS) % CLASSES, torch.arange(ROWS))


def trained(parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def plain_student(batch: Batch) -> Step:
    net = network("resnet8x4")
    return trained([*net.parameters()], lambda: F.cross_entropy(net(batch.image), batch.label))


def plain_kd(batch: Batch, temperature: float = 4.0) -> Step:
    student, teacher = network("resnet8x4"), network("resnet32x4").eval()

    def loss() -> Tensor:
        with torch.no_grad():
            soft = F.log_softmax(teacher(batch.image) / temperature, dim=1)
        logits = student(batch.image)
        log_p = F.log_softmax(logits / temperature, dim=1)
        distance = F.kl_div(log_p, soft, reduction="batchmean", log_target=True)
        return F.cross_entropy(logits, batch.label) + temperature**2 * distance

    return trained([*student.parameters()], loss)


def layers_of(key: str) -> Mapping[str, str]:
    loss = LOSSES[key]
    if not loss.takes_layers:
        return {}
    return loss.default_layers or PUBLISHED.get(key, LAYERS)


def kdsweep(key: str, batch: Batch, *, cached: bool) -> Step:
    layers = layers_of(key)
    student = Tapped(network("resnet8x4"), layers)
    teacher = freeze(Tapped(network("resnet32x4"), layers.values()))
    said = teacher_outputs(teacher, batch.image)
    with torch.no_grad():
        probe = Probe(student(batch.image), replace(batch, teacher=said), num_rows=DATASET)
    params = {name: held.default for name, held in LOSSES[key].hyperparameters.items()}
    terms = {
        "ce": LOSSES["ce"].build({}, {}, probe),
        "it": LOSSES[key].build(params, layers, probe),
    }
    step = DistillStep(student, terms, {"ce": 1.0, "it": LOSSES[key].weight}).train()
    rows = cache_of(said)
    every = np.arange(ROWS)

    def loss() -> Tensor:
        there = rows.outputs(0, every) if cached else teacher_outputs(teacher, batch.image)
        total: Tensor = step(replace(batch, teacher=there)).loss
        return total

    return trained([*step.parameters()], loss)


def torchdistill(key: str, batch: Batch) -> Step:
    from torchdistill_steps import online_loss

    student, teacher = network("resnet8x4"), network("resnet32x4")
    return trained(*online_loss(key, student, teacher, batch, rows=DATASET))


def peers() -> set[str]:
    """The losses that torchdistill has too, where it is installed."""
    if find_spec("torchdistill") is None:
        return set()
    from torchdistill_steps import LOSSES as THEIRS

    return set(THEIRS)


def cache_of(said: Outputs) -> TeacherRows:
    """What a cache would hold of this batch: half precision, one view."""
    features = {layer: held.half().numpy()[None] for layer, held in said.features.items()}
    return TeacherRows(said.logits.half().numpy()[None], features, said.classifier)


def cpu_ms(step: Step) -> float:
    started = time.process_time()
    step()
    return 1000 * (time.process_time() - started)


def main(rounds: int, keys: list[str]) -> None:
    torch.set_num_threads(1)
    batch = pictures()
    steps: dict[tuple[str, str], Step] = {("student", "plain"): plain_student(batch)}
    steps["kd", "plain"] = plain_kd(batch)
    for key in keys:
        steps[key, "online"] = kdsweep(key, batch, cached=False)
        steps[key, "cached"] = kdsweep(key, batch, cached=True)
        if key in peers():
            steps[key, "torchdistill"] = torchdistill(key, batch)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            times[name].append(cpu_ms(step))
    times = {name: held[1:] for name, held in times.items()}  # the first one warms up

    def ratio(name: tuple[str, str], to: tuple[str, str]) -> float:
        return median(a / b for a, b in zip(times[name], times[to], strict=True))

    command = f"step_cost.py {rounds} {' '.join(keys)}"
    print(f"# CPU time of one step, as a multiple of the plain student's\n\n`{command}` at commit")
    print(f"{commit().get('mlflow.source.git.commit', '(none)')}, one thread.\n")
    alone = ("student", "plain")
    plain = ratio(("kd", "plain"), alone)
    print(f"Student alone {median(times[alone]):.0f} ms, kd in plain torch {plain:.2f}x.\n")
    print(
        "| loss | from cache | asked | online | torchdistill, online |\n|---|---:|---:|---:|---:|"
    )
    for key in keys:
        asked = f"{ASKED[key]:.2f}" if key in ASKED else ""
        cached, online, theirs = (
            f"{ratio((key, way), alone):.3f}" if (key, way) in times else ""
            for way in ("cached", "online", "torchdistill")
        )
        print(f"| {key} | {cached} | {asked} | {online} | {theirs} |")
    if "kd" in keys:
        beside = ratio(("kd", "online"), ("kd", "plain"))
        print(f"\nkd online beside the plain loop: {beside:.3f} (asked 1.05)")


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 5,
        sys.argv[2:] or [k for k in LOSSES if k != "ce"],
    )
