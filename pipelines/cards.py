"""A sweep's best student in words: what it is, how it was made, how good it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.ranking import Ranking, compared

CARD = "model_card.md"


def model_card(ranking: Ranking) -> str:
    """The chosen student's card, as Markdown."""
    return "\n".join(
        [
            f"# Best student of sweep {_word(ranking.name)}",
            "",
            *_purpose(ranking),
            "",
            "## Numbers",
            "",
            *_numbers(ranking),
            "",
            "## Training",
            "",
            *_training(ranking),
            "",
        ]
    )


def _purpose(ranking: Ranking) -> Iterator[str]:
    run = ranking.best.run
    yield f"A `{run['student']['name']}`, trained on {_word(run['data']['name'])} and made plain: "
    yield "branches and other forms that only training needs are fused."
    yield "It takes pixels as they are stored, uint8 (B, C, H, W), and returns logits (B, classes)."


def _numbers(ranking: Ranking) -> Iterator[str]:
    first, held = ranking.rows[0], compared(ranking.rows)[0]
    metric = ranking.metric
    spread = "" if math.isnan(first.deviation) else f", sd {first.deviation:.4f}"
    seeds = f"{len(first.values)} seed" + ("s" if len(first.values) > 1 else "")
    yield f"* Validation, of its configuration: mean {metric} {first.mean:.4f}{spread}, {seeds}."
    if held is not None:
        yield (
            f"* Against the control: {held.difference:+.4f}, p {held.corrected:.3g} "
            "(paired t-test over seeds, Holm's correction)."
        )
    tested = ", ".join(f"{name} {value:.4f}" for name, value in ranking.test.items())
    yield f"* Test, seen once: {tested or 'none, the data have no test part'}."
    cost = first.cost
    yield (
        f"* {cost.parameters:,} parameters, {cost.flops:,} floating-point operations and "
        f"{1000 * cost.latency_s:.3g} ms for one picture on a CPU."
    )


def _training(ranking: Ranking) -> Iterator[str]:
    run, made = ranking.best.run, ranking.made
    yield f"* Data: {_word(run['data']['name'])}, sha256 `{made.data}`; selected on a validation "
    yield f"  split of {run['data']['validation']:.0%} of its training file."
    for teacher in ranking.teachers:
        said = f"cache `{teacher.cache}`" if teacher.cache else "heard live"
        numbers = "".join(f", {name} {value:.4f}" for name, value in teacher.metrics.items())
        yield f"* Taught by {_word(teacher.title)}: `{teacher.network}`, {said}{numbers}."
    for label, term in run["losses"].items():
        yield f"* Loss `{label}`: `{term['loss']}`, weight {_word(term['weight'])}, {_set(term)}."
    yield f"* {run['epochs']} epochs in batches of {run['batch_size']}, seed {run['seed']}."
    yield f"* Weights: `{ranking.best.weights}`."
    yield f"* Command: `{made.command or 'not recorded'}`."
    yield f"* Commit: `{made.commit or 'none'}`."


def _set(term: Mapping[str, Any]) -> str:
    params = ", ".join(f"{name} {value}" for name, value in term["params"].items())
    layers = ", ".join(f"{own} to {theirs}" for own, theirs in term["layers"].items())
    return " and ".join(filter(None, [params, layers])) or "no parameters"


def _word(value: Any) -> str:
    """As it is, but for what Markdown would take for HTML."""
    return str(value).replace("&", "&amp;").replace("<", "&lt;")
