"""What a method needs of its teacher and its students."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kdcore.datafree.observation import has_batch_norm
from kdcore.datafree.plans import Generators, Method, Offline
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.priors import PRIORS
from kdcore.taps import Tapped


def without_batch_norm(*, online: bool | None = None) -> list[str]:
    """The methods that a teacher without BatchNorm can be asked for: all, or those of one kind.

    ``online`` are those that make pictures while their student learns.
    """
    return [
        name
        for name, method in PRESETS.items()
        if online in (None, not isinstance(method.schedule, Offline))
        and not any(
            PRIORS[prior].needs_batch_norm for prior, one in method.priors.items() if one.weight
        )
    ]


def check_teacher(teacher: Tapped, method: Method) -> None:
    """Raise ValueError for one that is not frozen, or has no BatchNorm where a prior needs it."""
    training = any(module.training for module in teacher.modules())
    if training or any(held.requires_grad for held in teacher.parameters()):
        raise ValueError(
            "the teacher is not frozen: its statistics or gradients would move; pass it through "
            "freeze() first"
        )
    needing = [name for name in _named(method) if PRIORS[name].needs_batch_norm]
    if needing and not has_batch_norm(teacher.net):
        online = not isinstance(method.schedule, Offline)
        raise ValueError(
            f"the priors {needing} compare with the statistics that BatchNorm keeps, and "
            f"{type(teacher.net).__name__} has no such layer; methods that work without: "
            f"{', '.join(without_batch_norm(online=online))}"
        )


def check_students(students: Sequence[nn.Module], method: Method) -> None:
    """Raise ValueError where there are none and a prior needs one."""
    if not students and any(PRIORS[name].needs_student for name in _named(method)):
        raise ValueError("this method makes pictures against a student: give it `students`")


def check_ensemble(method: Method) -> None:
    """Raise ValueError for several generators under a prior that remembers: it hears the last."""
    remembering = [name for name in _named(method) if PRIORS[name].remembers]
    if isinstance(method.images, Generators) and method.images.count > 1 and remembering:
        raise ValueError(
            f"the priors {remembering} remember the pictures of the last generator alone, and "
            f"images.count is {method.images.count}; set it to 1, or their weights to 0"
        )


def _named(method: Method) -> list[str]:
    return [name for name, one in method.priors.items() if one.weight and name in PRIORS]
