"""Students of graphical models: distilled without data, against those trained otherwise.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/graphical.py [APPLICATION ...]; none: all of them.
Every cell is an application, a method and a seed: a line of graphical.jsonl in the folder KD_WORK
(default ../scratch/graphical), which is not run again. Whatever is there is written to
results/graphical.md.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcore.dgm.graph import DGM
from kdcore.dgm.marginals import marginal_divergence
from kdcore.dgm.trace import Trace
from pipelines.generative.batches import judge_of
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.inputs import GenerativeInputs, evidence_of, step_of
from pipelines.generative.models import load_model
from pipelines.loading import load
from pipelines.space import changed
from pipelines.tracking import COMMIT, commit
from pipelines.train import Finished, train_here

CONFIGS = Path("pipelines/configs/generative")
RESULTS = Path(__file__).parent / "results" / "graphical.md"
WORK = Path(os.environ.get("KD_WORK", "../scratch/graphical"))
SEEDS = (0, 1, 2)
COMPARED, ENUMERATED = 512, 20_000  # rows
Changes = Mapping[str, Any]

# steps are alike for all methods of an application: 400, of which data have 17 an epoch; of the
# eruptions 800, of which data have 1
HALF, SCRATCH = {"epochs": 10}, {"mode": "scratch", "epochs": 24}
DEEP = {"model.sizes": [4, 4, 2, 2, 1], "teacher.run.model.sizes": [4, 4, 2, 2, 1]}
PUBLISHED = {"distil.latent": "squared_w2", "distil.weight": 0.1, "distil.over_dims": "mean"}
OURS: dict[str, Changes] = {"ours": {}, "local": {"mode": "local"}, "scratch": SCRATCH}
APPLICATIONS: dict[str, tuple[str, Changes, Mapping[str, Changes]]] = {
    "pictures, 3 latents": ("digits.yaml", HALF, OURS),
    "pictures, 5 latents": (
        "digits.yaml",
        HALF | DEEP,
        OURS | {"ours, published weights": PUBLISHED},
    ),
    "rows of digits": (
        "rows.yaml",
        HALF,
        OURS,
    ),
    "eruptions": (
        "eruptions.yaml",
        {},
        {
            "ours": {},
            "ours, no gradient through bits (published)": {"distil.gradient": "none"},
            "local": {"mode": "local"},
            "marginalized": {"mode": "marginalized", "batch_size": 32},  # times 256 configurations
            "scratch": {"mode": "scratch", "epochs": 800, "batch_size": 216},
        },
    ),
    "split digits": (
        "new_digits.yaml",
        {"epochs": 30},
        {"distilled": {}, "generative replay": {"continual.replay": "generated"}},
    ),
}
# columns of the table: heading, and what it is called in a cell
TO_TEACHER = {"Frechet-T": "frechet", "EMD-T": "emd", "MMD-T": "mmd", "1NN-T": "one_nn"}

BY_SEED = "exact KL, seed by seed"


def run_of(application: str, method: str, seed: int) -> GenerativeConfig:
    file, common, methods = APPLICATIONS[application]
    base = load(CONFIGS / file)
    assert isinstance(base, GenerativeConfig)
    few = {"distances.rows": 64, "runs": str(WORK / "runs"), "seed": seed}
    run = changed(base, {**few, **common, **methods[method]})
    assert isinstance(run, GenerativeConfig)
    return run


def trained(run: GenerativeConfig) -> tuple[Finished, GenerativeInputs]:
    """The run and, before it, its teacher."""
    inputs = GenerativeInputs(None)
    if run.teacher is not None and run.teacher.run is not None:
        own = run.teacher.run.model_copy(update={"runs": run.runs})
        inputs = GenerativeInputs(trained(own)[0].weights)
    return train_here(run, inputs, lambda metrics: None), inputs


def measured(run: GenerativeConfig) -> dict[str, float]:
    """Distances of a trained student's samples, and where it can be enumerated the exact KL."""
    result, inputs = trained(run)
    assert run.teacher is not None
    assert inputs.weights is not None
    teacher = load_model(run.teacher.network, inputs.weights)
    student = load_model(run.model, result.weights)
    many = changed(run, {"distances.rows": COMPARED})
    assert isinstance(many, GenerativeConfig)
    cpu = torch.device("cpu")
    found = judge_of(many, teacher, evidence_of(many), cpu).of_run(student.generator)
    if run.model.name == "helmholtz":
        torch.manual_seed(0)
        with torch.no_grad():
            found["exact KL"] = float(
                marginal_divergence(
                    "kl", teacher.generator, student.generator, ENUMERATED, inputs={}
                )
            )
    bounds = {name: held for name, held in result.best.items() if "elbo_" in name}
    return found | bounds


def constants_at_start(run: GenerativeConfig) -> list[str]:
    """The variables that depend on nothing before training: every rectifier between is dead."""
    generator = step_of(run, None, blank=True)[0].generator
    assert isinstance(generator, DGM)
    alive: dict[str, bool] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda layer, seen, out: alive.update({name: bool((out > 0).any())})

    for name, conditional in generator.conditionals.items():
        for layer in conditional.modules():
            if isinstance(layer, nn.ReLU):
                layer.register_forward_hook(look(name))
    with torch.no_grad():
        generator(Trace(ENUMERATED, generator=torch.Generator().manual_seed(0)))
    return [name for name, is_alive in alive.items() if not is_alive]


def cells(applications: Iterable[str]) -> Iterable[tuple[str, str, int]]:
    for application in applications:
        for method in APPLICATIONS[application][2]:
            for seed in SEEDS:
                yield application, method, seed


def kept() -> list[dict[str, Any]]:
    file = WORK / "graphical.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def fill(applications: Iterable[str]) -> None:
    known = {(line["application"], line["method"], line["seed"]) for line in kept()}
    for application, method, seed in cells(applications):
        if (application, method, seed) in known:
            continue
        started = time.process_time()
        metrics = measured(run_of(application, method, seed))
        line = {"application": application, "method": method, "seed": seed, "metrics": metrics}
        if application == "eruptions":
            line["constant"] = constants_at_start(run_of(application, method, seed))
        line |= {"seconds": time.process_time() - started, "commit": commit().get(COMMIT, "")[:7]}
        with (WORK / "graphical.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(application, method, seed, f"{line['seconds']:.0f} s", flush=True)


def each(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def table(application: str, lines: list[dict[str, Any]]) -> str:
    own = [line for line in lines if line["application"] == application]
    columns = {title: f"samples/teacher/{name}" for title, name in TO_TEACHER.items()}
    if application == "split digits":
        columns |= {"ELBO, old": "val/elbo_old", "ELBO, new": "val/elbo_new"}
        columns["Frechet, new data"] = "samples/new_data/frechet"
    else:
        columns["Frechet, data"] = "samples/data/frechet"
    if application == "eruptions":
        columns[BY_SEED] = "exact KL"
    rows = [f"| | {' | '.join(columns)} | CPU s |", "|---" * (len(columns) + 2) + "|"]
    for method in APPLICATIONS[application][2]:
        held = [line for line in own if line["method"] == method]
        if held:
            values = [
                (each if title == BY_SEED else shown)([line["metrics"][name] for line in held])
                for title, name in columns.items()
            ]
            seconds = statistics.fmean(line["seconds"] for line in held)
            rows.append(f"| {method} ({len(held)}) | {' | '.join(values)} | {seconds:.0f} |")
    if own:
        rows.append(f"| {_floor(own, columns)} | |")
    words = [f"## {application[0].upper()}{application[1:]}", "", *rows]
    return "\n".join(words + _starts(own))


def _starts(own: list[dict[str, Any]]) -> list[str]:
    """Which students are born with a variable that no method can reach."""
    dead = {line["seed"]: line["constant"] for line in own if line.get("constant")}
    words = [
        f"Seed {seed}: in the student as it is drawn, before any method touches it, all rectifiers "
        f"in\nfront of {' and '.join(names)} are dead. It starts as a constant, and no gradient "
        "reaches what is\nbehind a dead rectifier."
        for seed, names in sorted(dead.items())
    ]
    return ["", *words] if words else []


def _floor(own: list[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """The teacher against itself, and against data: where a perfect student would be."""
    cells = ["teacher, the floor"]
    for name in columns.values():
        instead = name.replace("/teacher/", "/floor/").replace("/data/", "/teacher_data/")
        held = [line["metrics"][instead] for line in own if instead != name]
        cells.append(shown(held) if held else "")
    return " | ".join(cells)


def write() -> None:
    lines = kept()
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    minutes = sum(line["seconds"] for line in lines) / 60
    run = [name for name in APPLICATIONS if any(line["application"] == name for line in lines)]
    tables = "\n\n".join(table(application, lines) for application in run)
    lacking = "; ".join(name for name in APPLICATIONS if name not in run)
    RESULTS.write_text(
        f"""# Graphical models: students without data beside students with

`OMP_NUM_THREADS=1 python tests/benchmarks/graphical.py` at commit {commits}: {minutes:.0f} CPU
minutes, the teachers' in the first cell that needed them. One teacher an application, students of
seeds {", ".join(map(str, SEEDS))}; mean and standard deviation. All methods of an application take
400 steps (eruptions 800, split digits 30 epochs) at one learning rate, tuned for none. "-T" is
{COMPARED} samples against {COMPARED} of the teacher's from other noise, in the space of pixels or
numbers; "data" is against held-out rows. Less is better, 1-NN has its best at 0.5. "ours" is the
surrogate, KL (of bits cross-entropy), summed, weight 1; "local" hands over the teacher's latent
values; "scratch" learns from the teacher's data. Three seeds: differences of the size of the
spread mean nothing.
Not run here: {lacking or "nothing"}.

{tables}
"""
    )


def main(applications: list[str]) -> None:
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    fill(applications or APPLICATIONS)
    write()


if __name__ == "__main__":
    main(sys.argv[1:])
