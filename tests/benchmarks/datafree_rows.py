"""The rows of the table of data-free methods: presets, and what a budget changes of them.

Every change is one of budget or of picture size, unless the name of the row says another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from pydantic import TypeAdapter

from kdcore.datafree.plans import Method
from kdcore.datafree.presets import PRESETS
from pipelines.methods import changed_plan

BATCH = 128  # of every student
REAL = "student on real data"
QUANTISED = "dfq, then 8 bits"

_OFFLINE = {"images": {"lr": 0.1}, "schedule": {"batch_size": 256, "steps": 150}}
_T4 = {"losses": {"kd": {"params": {"temperature": 4.0}}}}
_THIN = {"network": {"latent": 64, "width": 32}}
_POOLED = {"student_steps": 10, "student_batch_size": BATCH, "batch_size": BATCH}
# a crop pads with grey, which no digit has around it, and a mirrored digit is none
_NO_VIEW = {"view": {"crop": 0, "flip": False}, "student_view": {"crop": 0, "flip": False}}
_STATISTICS = {"priors": {"statistics": {"weight": 10.0}}}

_DFQ = {
    "images": _THIN,
    "schedule": {"batch_size": BATCH, "student_steps": 5, "rounds": 50, "warmup": 50},
    "priors": {
        "disagreement": {"after": 50},
        **{name: {"weight": 0.1} for name in ("statistics_divergence", "entropy", "balance")},
    },
}

BUDGETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "noise": ("noise", _T4),
    "lopes": ("lopes", {"schedule": {"batch_size": 256, "steps": 150}}),
    "zskd": ("zskd", {**_OFFLINE, "student_view": {"crop": 0, "flip": False}}),
    "soft_target": ("soft_target", {**_OFFLINE, **_T4}),
    "lopes + statistics": (
        "lopes",
        {"schedule": {"batch_size": 256, "steps": 150}, **_STATISTICS},
    ),
    "zskd + statistics": (
        "zskd",
        {**_OFFLINE, "student_view": {"crop": 0, "flip": False}, **_STATISTICS},
    ),
    "soft_target + statistics": ("soft_target", {**_OFFLINE, **_T4, **_STATISTICS}),
    "deepinversion": ("deepinversion", {**_OFFLINE, **_T4, "view": {"roll": 1}}),
    "adaptive_deepinversion": (
        "adaptive_deepinversion",
        {
            "schedule": {**_POOLED, "batch_size": 256, "steps": 150, "student_steps": 250},
            **_T4,
            "view": {"roll": 1, "flip": False},
            "student_view": {"crop": 0, "flip": False},
        },
    ),
    "dafl": (
        "dafl",
        {"images": {**_THIN, "lr": 2e-3}, "schedule": {"batch_size": BATCH, "rounds": 100}},
    ),
    "dafl + replay": (
        "dafl",
        {
            "images": {**_THIN, "lr": 2e-3},
            "schedule": {"batch_size": BATCH, "rounds": 50, "student_steps": 2, "replay": True},
        },
    ),
    "dafl + statistics, fresh pictures": (
        "dafl",
        {
            "images": {**_THIN, "lr": 2e-3},
            "schedule": {
                "batch_size": BATCH,
                "rounds": 100,
                "student_steps": 5,
                "student_sees": "fresh",
            },
            "priors": {"statistics": {"weight": 1.0}},
        },
    ),
    "zskt": (
        "zskt",
        {"images": _THIN, "schedule": {"rounds": 50}},
    ),
    "zskt without maps": (
        "zskt",
        {"images": _THIN, "schedule": {"rounds": 50}, "losses": {"at": {"weight": 0.0}}},
    ),
    "dfq": ("dfq", _DFQ),
    QUANTISED: ("dfq", _DFQ),
    "cmi": (
        "cmi",
        {
            "images": {**_THIN, "lr": 5e-3, "latent_lr": 5e-3},
            "schedule": {**_POOLED, "steps": 100, "student_steps": 125, "warmup": 1},
            "priors": {"masked_disagreement": {"after": 1}},
            **_NO_VIEW,
            **_T4,
        },
    ),
    **{
        f"fast ({kind})": (
            "fast",
            {
                "images": {**_THIN, "kind": kind, "lr": 5e-3, "latent_lr": 0.015, "meta_lr": 0.025},
                "schedule": {**_POOLED, "warmup": 10},
                "priors": {"masked_disagreement": {"after": 10}},
                **_NO_VIEW,
                **_T4,
            },
        )
        for kind in ("fomaml", "reptile", "sequential")
    },
}


def method_of(row: str) -> Method:
    """The method of a row; real pictures are looked at as noise is, and learned by as noise is."""
    preset, changes = BUDGETS["noise" if row == REAL else row]
    method: Method = changed_plan(PRESETS[preset], changes, (row,))
    return method


def digest_of(row: str) -> str:
    """Of every value of a row's method: what was measured with others is measured again."""
    content = TypeAdapter(Method).dump_json(method_of(row))
    return sha256(json.dumps(json.loads(content), sort_keys=True).encode()).hexdigest()[:12]
