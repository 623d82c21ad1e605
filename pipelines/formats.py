"""How a teacher's logits are kept, and which losses may read them then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, PositiveInt, Tag

from kdcore.losses import Logits, Stateful
from pipelines.custom_losses import loss_line
from pipelines.strict import Strict
from pipelines.terms import LossConfig, ScheduleConfig

# Of few classes the small ones matter once the logits are softened: at 100 classes and T = 4 the
# best rule for the tail of a top-10 is off by 0.24 in L1, uint8 by 0.003.
ENOUGH_CLASSES = 1000


class TopConfig(Strict):
    """The greatest logits, the label's, and the logarithm of the sum of all exponentials."""

    top: PositiveInt  # how many
    force: bool = False  # although a loss softens them and there are few classes


def _kind(value: Any) -> str:
    return "(top)" if isinstance(value, dict | TopConfig) else "(all)"


LogitsFormat = Annotated[
    Annotated[Literal["float16", "uint8"], Tag("(all)")] | Annotated[TopConfig, Tag("(top)")],
    Discriminator(_kind),
]


def check_readable(
    kept: LogitsFormat, terms: Mapping[str, LossConfig], *, num_classes: int
) -> None:
    """Raise ValueError where a term needs logits that a teacher's cache does not keep."""
    if not isinstance(kept, TopConfig):
        return
    if kept.top > num_classes:
        raise ValueError(f"logits.top is {kept.top}, and there are {num_classes} classes")
    if kept.force or num_classes >= ENOUGH_CLASSES:
        return
    for label, term in terms.items():
        if _softens(term):
            raise ValueError(
                f"losses.{label} softens the teacher's logits, and logits: {{top: {kept.top}}} of "
                f"{num_classes} classes lacks the small ones, which then matter; keep them all "
                "(logits: uint8), use temperature 1, or say logits.force: true"
            )


def _softens(term: LossConfig) -> bool:
    """Whether the term reads logits at a temperature above 1, or at one that it finds itself."""
    loss = loss_line(term.loss)
    if loss.takes_layers or not loss.needs_teacher:
        return False
    if isinstance(loss, Stateful) or not {"temperature", "temperatures"} & set(term.params):
        return isinstance(loss, Logits | Stateful)
    held = term.params.get("temperature", term.params.get("temperatures"))
    return max(_values(held)) > 1


def _values(held: Any) -> list[float]:
    if isinstance(held, dict):
        return ScheduleConfig.model_validate(held).extremes
    return list(held) if isinstance(held, list | tuple) else [held]
