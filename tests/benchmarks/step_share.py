"""Process time of the losses on samples, as shares of one training step of ResNet-18.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/step_share.py [ROUNDS]. One thread, float32, 128
pictures of 32 x 32, 100 classes. A step is forward, backward and SGD with cross-entropy alone; a
loss is forward and backward with its default parameters on embeddings of width 512. Medians. The
stem is torchvision's, as in KD2M's experiments, or a 3x3 convolution at stride 1 without pool.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.losses import LOSSES, Features
from pipelines.models import build_network
from pipelines.networks import ModelConfig

NUM_ROWS, WIDTH, NUM_CLASSES = 128, 512, 100
ASKED = 3.0  # per cent


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - start))
    return median(times)


def training_step(stem: str) -> Callable[[], object]:
    config = ModelConfig.model_validate({"name": "torchvision/resnet18", "stem": stem})
    net = build_network(config, num_classes=NUM_CLASSES, in_channels=3).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    image, label = torch.randn(NUM_ROWS, 3, 32, 32), torch.randint(NUM_CLASSES, (NUM_ROWS,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(image), label).backward()
        optimizer.step()

    return step


def inputs() -> dict[str, Tensor]:
    label = torch.randint(NUM_CLASSES, (NUM_ROWS,))
    centre = torch.randn(NUM_CLASSES, WIDTH)
    teacher = torch.relu(centre[label] + torch.randn(NUM_ROWS, WIDTH))
    student = torch.relu(0.7 * teacher + 0.6 * torch.randn(NUM_ROWS, WIDTH))
    logits = torch.randn(2, NUM_ROWS, NUM_CLASSES)
    return {
        "student": student.requires_grad_(),
        "teacher": teacher,
        "label": label,
        "student_logits": logits[0].clone().requires_grad_(),
        "teacher_logits": logits[1],
    }


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = {
        stem: milliseconds(training_step(stem), max(rounds // 10, 2))
        for stem in ("original", "small")
    }
    print(
        *(f"a step with the {stem} stem: {took:.0f} ms" for stem, took in steps.items()), sep="\n"
    )
    print(f"{'loss':16} {'ms':>7}   share of a step, original and small stem (asked: < {ASKED} %)")
    given = inputs()
    for key, loss in LOSSES.items():
        if isinstance(loss, Features) and loss.batch_level and set(loss.inputs) <= set(given):
            chosen = [given[name] for name in loss.inputs]
            took = milliseconds(lambda f=loss.function, x=chosen: f(*x).backward(), rounds)
            shares = [100 * took / step for step in steps.values()]
            note = "  more than asked" if max(shares) > ASKED else ""
            print(f"{key:16} {took:7.2f}   {shares[0]:6.2f} % {shares[1]:6.2f} %{note}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
