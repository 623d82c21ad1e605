"""The few error messages that every loss shares, raised where torch would broadcast silently."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from torch import Tensor


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both tensors have one shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )


def check_same_width(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both are matrices (rows, width) of one width."""
    if student.ndim != 2 or teacher.ndim != 2 or student.shape[1] != teacher.shape[1]:
        raise ValueError(
            "student and teacher must be matrices (rows, width) of the same width, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def check_same_rows(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both have as many samples."""
    if student.shape[:1] != teacher.shape[:1]:
        raise ValueError(
            f"student and teacher must have the same samples, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )


def check_num_classes(logits: Tensor) -> None:
    """Raise ValueError for logits of a single class, beside which there is no other."""
    if logits.shape[1] < 2:
        raise ValueError(
            f"this loss compares classes and needs at least two, got logits of shape "
            f"{tuple(logits.shape)}; use ce or kd"
        )


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both are maps (B, C, H, W) of one batch, height and width."""
    alike = student.shape[0] == teacher.shape[0] and student.shape[2:] == teacher.shape[2:]
    if student.ndim != 4 or teacher.ndim != 4 or not alike:
        raise ValueError(
            "student and teacher must be maps (B, C, H, W) of the same height and width, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not in a table, with the nearest one that is."""
    names = sorted(known)
    nearest = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(names)}"
    return f"unknown {kind} {name!r}; {hint}"
