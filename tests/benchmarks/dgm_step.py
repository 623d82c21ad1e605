"""CPU time of one step of distilling a graphical model, beside its three unavoidable passes.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/dgm_step.py. Writes results/dgm_step.md.
`DGMDistiller`'s forward and backward beside the teacher's forward, the student's forward and the
student's backward on their own: each a run that draws its variables, the backward from ones at all
parameters of the conditionals. The VRNN of 100 steps also beside the same loss by a bare eager loop
over the same cells, which knows no distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore.dgm.distiller import DGMDistiller
from kdcore.dgm.families import parameters_of
from kdcore.dgm.models.helmholtz import belief_generator, helmholtz_generator
from kdcore.dgm.models.ladder import SIZES, Ladder, LadderGenerator
from kdcore.dgm.models.vrnn import VRNNGenerator
from kdcore.dgm.objective import PUBLISHED, Objective
from kdcore.dgm.trace import Trace
from pipelines.tracking import COMMIT, commit

RESULTS = Path(__file__).parent / "results" / "dgm_step.md"
ASKED_STEP, ASKED_LOOP = 1.15, 1.3
STEPS = 100
PIXELS = 28 * 28


@dataclass(frozen=True)
class Family:
    """A teacher and its student; of small models many rounds, or the clock's grain would count."""

    teacher: nn.Module
    student: nn.Module
    objective: Objective
    rows: int
    rounds: int


# published sizes, but for the length of the strokes and for the pictures of bits
FAMILIES = {
    "ladder VAE, 32 px, 128 to 16": Family(
        LadderGenerator(Ladder(128, 32, SIZES[32])),
        LadderGenerator(Ladder(16, 32, SIZES[32])),
        PUBLISHED["ladder_vae"],
        rows=16,
        rounds=7,
    ),
    "VRNN, 100 steps, 512 to 128": Family(
        VRNNGenerator(length=STEPS, hidden=512, state=1200),
        VRNNGenerator(length=STEPS, hidden=128, state=600),
        Objective(),
        rows=32,
        rounds=7,
    ),
    "Helmholtz machine of eruptions, 8 to 2": Family(
        helmholtz_generator(8), helmholtz_generator(2), PUBLISHED["helmholtz"], rows=272, rounds=500
    ),
    "Helmholtz machine of 28x28 bits, 512 to 128": Family(
        belief_generator((128, 64, 32), 512, pixels=PIXELS),
        belief_generator((128, 64, 32), 128, pixels=PIXELS),
        PUBLISHED["helmholtz"],
        rows=128,
        rounds=50,
    ),
}
Times = dict[str, list[float]]


def milliseconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started)


def passes(teacher: nn.Module, student: nn.Module, rows: int) -> Callable[[], object]:
    """The teacher's forward, the student's forward, the student's backward."""

    def work() -> None:
        with torch.no_grad():
            teacher(Trace(rows))
        run = Trace(rows)
        student(run)
        outputs = [
            p for site in run.sites.values() for p in parameters_of(site.distribution).values()
        ]
        trained = [output for output in outputs if output.requires_grad]
        torch.autograd.backward(trained, [torch.ones_like(output) for output in trained])
        student.zero_grad()

    return work


def distillation(distiller: DGMDistiller, rows: int) -> Callable[[], object]:
    def work() -> None:
        distiller(rows).loss.backward()
        distiller.student.zero_grad()  # as in the passes: to ask the teacher costs time too

    return work


def bare_run(
    model: VRNNGenerator, noise: Tensor, x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The cells of a VRNN by hand: outputs of prior and decoder, and the targets of every step."""
    zero = torch.zeros(noise.shape[1], model.state_width)
    state, priors, outs, xs = (zero, zero), [], [], []
    for t in range(STEPS):
        priors.append(model.prior(state[0]))
        mean, log_variance = priors[-1].chunk(2, dim=1)
        z = model.of_z(mean + (log_variance / 2).exp() * noise[t])
        outs.append(model.decoder(torch.cat([z, state[0]], dim=1)))
        if x is None:
            pen, way = outs[-1][:, :1], outs[-1][:, 1:]
            drawn = (torch.rand_like(pen) < pen.sigmoid()).float()
            xs.append(torch.cat([drawn, way + torch.randn_like(way)], dim=1))
        if t + 1 < STEPS:
            seen = model.of_x(xs[-1] if x is None else x[t])
            state = model.cell(torch.cat([seen, z], dim=1), state)
    return torch.stack(priors), torch.stack(outs), x if x is not None else torch.stack(xs)


def bare_loop(teacher: VRNNGenerator, student: VRNNGenerator, rows: int) -> Callable[[], object]:
    """The same loss as the distiller's, written out over stacked steps."""

    def work() -> None:
        noise = torch.randn(STEPS, rows, 16)
        with torch.no_grad():
            prior_t, out_t, x = bare_run(teacher, noise, None)
        prior, out, _ = bare_run(student, noise, x)
        (m_t, v_t), (m, v) = prior_t.chunk(2, dim=2), prior.chunk(2, dim=2)
        latent = (v - v_t + (v_t - v).exp() + (m_t - m).square() / v.exp() - 1).sum() / 2
        pen = F.binary_cross_entropy_with_logits(
            out[..., :1], out_t[..., :1].sigmoid(), reduction="sum"
        )
        way = (out[..., 1:] - out_t[..., 1:]).square().sum() / 2
        ((latent + pen + way) / rows).backward()
        student.zero_grad()

    return work


def measured(family: Family) -> Times:
    """CPU milliseconds of a step and of what it is compared with, all in every round."""
    teacher, student, rows = family.teacher, family.student, family.rows
    distiller = DGMDistiller(teacher, student, family.objective).train()
    works = {"passes": passes(teacher, student, rows), "step": distillation(distiller, rows)}
    if isinstance(teacher, VRNNGenerator) and isinstance(student, VRNNGenerator):
        works["loop"] = bare_loop(teacher, student, rows)
    times: Times = {key: [] for key in works}
    for _ in range(family.rounds + 1):
        for key, work in works.items():
            times[key].append(milliseconds(work))
    return {key: held[1:] for key, held in times.items()}  # the first one warms up


def line(name: str, without: list[float], step: list[float], asked: float) -> str:
    ratio = median(a / b for a, b in zip(step, without, strict=True))
    met = "yes" if ratio <= asked else "no"
    cells = f"{median(without):.2f} | {median(step):.2f} | {ratio:.3f} | {asked} | {met}"
    return f"| {name} | {cells} |\n"


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = []
    for name, family in FAMILIES.items():
        times = measured(family)
        lines.append(line(name, times["passes"], times["step"], ASKED_STEP))
        if "loop" in times:
            lines.append(
                line(f"{name}, beside a bare loop", times["loop"], times["step"], ASKED_LOOP)
            )
        print(lines[-1], end="", flush=True)
    tiny = sum(
        p.numel() for p in FAMILIES["Helmholtz machine of eruptions, 8 to 2"].student.parameters()
    )
    RESULTS.write_text(
        f"""# What a step of distillation takes beside the passes it cannot do without

`OMP_NUM_THREADS=1 python tests/benchmarks/dgm_step.py` at commit
{commit().get(COMMIT, "(none)")[:7]}. CPU time on one thread, float32; torch {torch.__version__}.
"Passes" are the teacher's forward, the student's forward and the student's backward on their own;
"ratio" is the median over rounds of the ratio within a round.

| model | beside, ms | step, ms | ratio | asked, at most | met |
|---|---:|---:|---:|---:|---|
{"".join(lines)}
The student of the eruptions has {tiny} parameters: what it costs are calls, not numbers, and the
comparison of its variables adds calls of its own.
"""
    )


if __name__ == "__main__":
    main()
