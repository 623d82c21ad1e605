"""Process time of the distances beside the published formulations, written plainly with POT.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/kd2m.py [ROUNDS]. One thread, float32, forward and
backward with respect to the student, 128 rows of width 512. Both sides of a pair alternate by ten,
so that what else the machine does meets both; the median and the least of each are printed.

"Published" is KD2M's code (github eddardd/kddm, 5489263) with the one-line repair without which its
class-conditional losses raise TypeError, and for the full covariances, which it does not have, POT
and torch.distributions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import ot
import torch
from torch import Tensor

from kdcore.metrics.conditional import class_wasserstein, joint_wasserstein, label_costs
from kdcore.metrics.gaussians import class_gaussian_wasserstein, gaussian_kl, gaussian_wasserstein
from kdcore.metrics.kernels import gaussian_mmd
from kdcore.metrics.transport import squared_wasserstein

NUM_ROWS, WIDTH = 128, 512
Distance = Callable[[Tensor], Tensor]


def published_w2(student: Tensor, teacher: Tensor) -> Tensor:
    cost = torch.cdist(student, teacher) ** 2
    with torch.no_grad():
        plan = ot.emd(
            torch.ones(len(student)) / len(student), torch.ones(len(teacher)) / len(teacher), cost
        )
    return (plan * cost).sum()


def published_cw2(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    total = torch.zeros(())
    for c in torch.unique(label):
        total = total + published_w2(student[label == c], teacher[label == c])
    return total


def published_jw2(student: Tensor, teacher: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """As the slides say; the code compares the student with itself."""
    onehot = torch.nn.functional.one_hot(label, num_classes).float()
    cost = torch.cdist(student, teacher) ** 2 + torch.cdist(onehot, onehot) ** 2
    with torch.no_grad():
        uniform = torch.ones(len(student)) / len(student)
        plan = ot.emd(uniform, uniform, cost)
    return (plan * cost).sum()


def published_diagonal_w2(student: Tensor, teacher: Tensor) -> Tensor:
    def spread(rows: Tensor) -> Tensor:
        return rows.std(dim=0, correction=0)

    means = (student.mean(dim=0) - teacher.mean(dim=0)).square().sum()
    return means + (spread(student) - spread(teacher)).square().sum()


def published_conditional_diagonal_w2(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    total = torch.zeros(())
    for c in torch.unique(label):
        total = total + published_diagonal_w2(student[label == c], teacher[label == c])
    return total


def covariance(rows: Tensor, eps: float) -> Tensor:
    centred = rows - rows.mean(dim=0)
    return centred.mT @ centred / len(rows) + eps * torch.eye(rows.shape[1])


def published_full_w2(student: Tensor, teacher: Tensor) -> Tensor:
    means = student.mean(dim=0), teacher.mean(dim=0)
    covariances = covariance(student, 1e-6), covariance(teacher, 1e-6)
    return ot.gaussian.bures_wasserstein_distance(*means, *covariances) ** 2


def published_full_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = (
        torch.distributions.MultivariateNormal(
            rows.mean(dim=0), covariance(rows, 0.1), validate_args=False
        )
        for rows in (student, teacher)
    )
    return torch.distributions.kl_divergence(p, q)


def published_mmd(student: Tensor, teacher: Tensor) -> Tensor:
    inner = torch.cdist(student, student), torch.cdist(teacher, teacher)
    between = torch.cdist(student, teacher)
    with torch.no_grad():
        sigma = torch.cat([matrix.flatten() for matrix in (*inner, between)]).mean()
    kernels = [torch.exp(-(matrix**2) / (2 * sigma**2)) for matrix in (*inner, between)]
    return kernels[0].mean() + kernels[1].mean() - 2 * kernels[2].mean()


def pairs(
    teacher: Tensor, label: Tensor, num: int
) -> Iterator[tuple[str, str, Distance, Distance]]:
    """Name, ratio asked for, published, ours."""
    logits = torch.zeros(NUM_ROWS, num)

    def joint(student: Tensor) -> Tensor:
        cost = label_costs(logits, logits, label, label, kind="onehot")
        return joint_wasserstein(student, teacher, cost, beta=1.0)

    yield "W2", "1.4", lambda s: published_w2(s, teacher), lambda s: squared_wasserstein(s, teacher)
    yield (
        "CW2",
        "6" if num == 10 else "25",
        lambda s: published_cw2(s, teacher, label),
        lambda s: class_wasserstein(s, teacher, label, label, reduction="sum"),
    )
    yield "JW2 one-hot", "-", lambda s: published_jw2(s, teacher, label, num), joint
    yield (
        "W2(G) diagonal",
        "-",
        lambda s: published_diagonal_w2(s, teacher),
        lambda s: gaussian_wasserstein(s, teacher),
    )
    yield (
        "CW2(G) diagonal",
        "-",
        lambda s: published_conditional_diagonal_w2(s, teacher, label),
        lambda s: class_gaussian_wasserstein(s, teacher, label, label, reduction="sum"),
    )
    yield (
        "W2(G) full",
        "20",
        lambda s: published_full_w2(s, teacher),
        lambda s: gaussian_wasserstein(s, teacher, covariance="full"),
    )
    yield (
        "KL(G) full",
        "5",
        lambda s: published_full_kl(s, teacher),
        lambda s: gaussian_kl(s, teacher, covariance="full", eps=0.1),
    )
    yield (
        "MMD Gaussian",
        "-",
        lambda s: published_mmd(s, teacher),
        lambda s: gaussian_mmd(s, teacher, bandwidth="mean"),
    )


def milliseconds(distance: Distance, student: Tensor) -> float:
    leaf = student.clone().requires_grad_()
    start = time.process_time()
    distance(leaf).backward()
    return 1e3 * (time.process_time() - start)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    print(
        f"{NUM_ROWS} x {WIDTH} float32, forward and backward, process time in ms, {rounds} rounds"
    )
    print(
        f"{'distance':16} {'C':>3}   published: median, least   ours: median, least   ratio (asked)"
    )
    for num_classes in (10, 100):
        torch.manual_seed(0)
        label = torch.randint(num_classes, (NUM_ROWS,))
        centre = torch.randn(num_classes, WIDTH)
        teacher = torch.relu(centre[label] + torch.randn(NUM_ROWS, WIDTH))
        student = torch.relu(0.7 * teacher + 0.6 * torch.randn(NUM_ROWS, WIDTH))
        for name, asked, published, ours in pairs(teacher, label, num_classes):
            expected = published(student).reshape(())  # POT gives one number in a vector
            torch.testing.assert_close(ours(student), expected, rtol=1e-2, atol=1e-3)
            slow = 5 if "full" in name else 1
            theirs, mine = [], []
            for _ in range(max(rounds // slow // 10, 2)):
                theirs += [milliseconds(published, student) for _ in range(10)]
                mine += [milliseconds(ours, student) for _ in range(10)]
            ratio = median(theirs) / median(mine)
            print(
                f"{name:16} {num_classes:3}   {median(theirs):10.2f} {min(theirs):10.2f}"
                f"   {median(mine):10.2f} {min(mine):10.2f}   {ratio:6.1f} ({asked})",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
