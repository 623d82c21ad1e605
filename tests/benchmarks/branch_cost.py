"""What branches cost in training, and that their fused student costs what the plain one does.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/branch_cost.py [ROUNDS], whose output is kept in
results/branch_cost.md. ResNet-8x4 on 64 pictures of 32x32, branches on its last stage, one thread,
CPU time of forward, backward and SGD. The floor of a step with m branches is the plain step and
one convolution more with m times the output channels, forward and backward, in the same rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdcore.kdiffusion.branches import add_branches
from kdcore.kdiffusion.fuse import fuse
from kdcore.kdiffusion.kinds import Kind
from kdcore.losses import LOSSES
from kdcore.models import MODELS
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.types import Batch, Outputs, Probe
from pipelines.tracking import commit

ROWS, CLASSES, STAGE = 64, 100, "layer3"
WIDTH, SIZE = 256, 8  # of the last stage of ResNet-8x4, and of ResNet-32x4
COUNTS = (2, 4, 8, 16)
Step = Callable[[], None]


def network() -> nn.Module:
    torch.manual_seed(0)
    return MODELS["resnet8x4"](CLASSES)


def branched(count: int, kind: Kind) -> nn.Module:
    return add_branches(network(), [STAGE], count, kinds=[kind])


def batch_of() -> Batch:
    features = {STAGE: torch.randn(ROWS, WIDTH, SIZE, SIZE)}
    teacher = Outputs(torch.randn(ROWS, CLASSES), features)
    image = torch.randn(ROWS, 3, 32, 32)
    return Batch(image, torch.arange(ROWS) % CLASSES, torch.arange(ROWS), teacher)


def trained(module: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def alone(net: nn.Module, batch: Batch) -> Step:
    return trained(net, lambda: F.cross_entropy(net(batch.image), batch.label))


def taught(net: nn.Module, batch: Batch) -> Step:
    """With the loss of as many steps as there are branches, from a cache."""
    layer = f"{STAGE}.0.conv2.branches"
    student = Tapped(net, [layer])
    with torch.no_grad():
        probe = Probe(student(batch.image), batch)
    count = probe.student.features[layer].shape[1]
    layers = {layer: STAGE}
    terms = {
        "ce": LOSSES["ce"].build({}, {}, probe),
        "it": LOSSES["kdiffusion"].build({"steps": count}, layers, probe),
    }
    step = DistillStep(student, terms, {"ce": 1.0, "it": 1.0}).train()
    return trained(step, lambda: step(replace(batch)).loss)


def wide_convolution(count: int) -> Step:
    held = torch.randn(ROWS, WIDTH, SIZE, SIZE, requires_grad=True)
    convolution = nn.Conv2d(WIDTH, count * WIDTH, 3, padding=1, bias=False)
    gradient = torch.randn(ROWS, count * WIDTH, SIZE, SIZE)

    def step() -> None:
        held.grad = convolution.weight.grad = None
        convolution(held).backward(gradient)

    return step


def inference(net: nn.Module, batch: Batch) -> Step:
    net = net.eval()

    @torch.inference_mode()
    def step() -> None:
        net(batch.image)

    return step


def medians(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """CPU milliseconds, all in the same rounds, of which the first warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            times[name].append(1000 * (time.process_time() - started))
    return {name: median(held[1:]) for name, held in times.items()}


def flops(net: nn.Module, batch: Batch) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net.eval()(batch.image)
    return int(counter.get_total_flops())


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    batch = batch_of()
    print(f"# What branches cost\n\n`branch_cost.py {rounds}` at commit")
    print(
        f"{commit().get('mlflow.source.git.commit', '(none)')}, one thread. Ratios of CPU time.\n"
    )
    print("| branches | over the floor | over the plain step | with the loss, over the plain |")
    print("|---|---:|---:|---:|")
    kinds: tuple[Kind, ...] = ("same", "1x1")
    for kind in kinds:
        for count in COUNTS:
            cost = medians(
                {
                    "plain": alone(network(), batch),
                    "branches": alone(branched(count, kind), batch),
                    "taught": taught(branched(count, kind), batch),
                    "wide": wide_convolution(count),
                },
                rounds,
            )
            floor = cost["plain"] + cost["wide"]
            over = f"{cost['branches'] / floor:.3f}" if kind == "same" else ""
            plain = [f"{cost[name] / cost['plain']:.3f}" for name in ("branches", "taught")]
            print(f"| {count} {kind} | {over} | {' | '.join(plain)} |", flush=True)
    plain, fused = network().eval(), fuse(branched(8, "same").eval())
    cost = medians({"plain": inference(plain, batch), "fused": inference(fused, batch)}, 5 * rounds)
    size, fused_size = (sum(p.numel() for p in net.parameters()) for net in (plain, fused))
    print(f"\nFused from 8 branches: {fused_size:,} parameters, the plain student {size:,};")
    print(f"{flops(fused, batch):,} operations, the plain student {flops(plain, batch):,};")
    print(
        f"latency {cost['fused'] / cost['plain']:.3f} of the plain student's (asked 1.00 ± 0.02)."
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
