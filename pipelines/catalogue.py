"""LOSSES as a table to read, made from the functions' own docstrings."""

from __future__ import annotations

import inspect
import re

from kdcore.losses import LOSSES, Loss

HEAD = ("loss", "compares", "needs", "over", "weight", "what it is", "source")


def losses_table() -> str:
    """Every loss that a configuration may name, as Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += [f"| {' | '.join(_cells(key, loss))} |" for key, loss in LOSSES.items()]
    return "\n".join(lines)


def _cells(key: str, loss: Loss) -> tuple[str, ...]:
    text = inspect.cleandoc(loss.function.__doc__ or "")
    return (
        f"`{key}`",
        "features" if loss.takes_layers else "logits",
        _needs(loss),
        "whole batch" if loss.batch_level else "each sample",
        f"{loss.weight:g}",
        text.split("\n\n")[0].replace("\n", " "),
        _source(text),
    )


def _needs(loss: Loss) -> str:
    if not loss.needs_teacher:
        return "labels"
    return "teacher, layers" if loss.takes_layers and not loss.default_layers else "teacher"


def _source(text: str) -> str:
    """Authors, year and number, without the place in the paper and where we differ."""
    found = re.search(r"Source: (.+?)(?:, section|, the row|, with|, eq|\.\s|\Z)", text, re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""
