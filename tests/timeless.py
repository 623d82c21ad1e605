"""What an epoch gave, without what the machine took for it."""

from __future__ import annotations

from collections.abc import Mapping


def timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    """The numbers that the same run has again."""
    of_machine = ("seconds", "system/")
    return {name: value for name, value in metrics.items() if not name.startswith(of_machine)}
