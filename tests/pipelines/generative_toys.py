"""Graphical models at the size of a test: each of the four applications with its teacher."""

from __future__ import annotations

from typing import Any

FEW = {"rows": 32}
FAST = {"name": "adam", "lr": 5e-3, "weight_decay": 0}
DIGITS = {"name": "digits", "limit": 240, "validation": 0.2}


def _pair(
    model: dict[str, Any], narrow: dict[str, Any], data: dict[str, Any], **more: Any
) -> dict[str, Any]:
    common = {"batch_size": 32, "optimizer": FAST, "distances": FEW, **more}
    teacher = {**common, "name": "toy_teacher", "model": model, "data": data, "epochs": 2}
    student = {"name": "toy", "model": {**model, **narrow}, "teacher": {"run": teacher}}
    return {**common, **student, "epochs": 3, "batches": 5}


LADDER = {"name": "ladder_vae", "width": 6, "image": [1, 8, 8], "sizes": [4, 1]}
ROWS = {"name": "vrnn", "hidden": 12, "state": 12, "latent": 4, "length": 8, "continuous": 8}
BITS = {"name": "belief_network", "width": 12, "bits": [8, 6], "image": [1, 8, 8]}
ERUPTIONS = {"name": "helmholtz", "width": 8}
STUDENTS: dict[str, dict[str, Any]] = {
    "ladder": _pair(LADDER, {"width": 3}, DIGITS),
    "vrnn": _pair(ROWS, {"hidden": 6, "state": 6}, DIGITS),
    "bits": _pair(BITS, {"width": 4}, DIGITS, distil={"like": "helmholtz"}),
    "eruptions": _pair(
        ERUPTIONS,
        {"width": 2},
        {"table": "eruptions", "rows": 160},
        distil={"like": "helmholtz", "gradient": "straight_through"},
    ),
}
CONDITIONS = {**LADDER, "conditions": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]}
GOING_ON = _pair(CONDITIONS, {}, DIGITS, batch_size=16) | {"mode": "continual", "data": DIGITS}
