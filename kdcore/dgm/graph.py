"""Models declared as a list of variables and their parents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributions import Distribution

from kdcore.dgm.trace import Trace

NodeKind = Literal["input", "latent", "target", "deterministic"]


@dataclass(frozen=True)
class Node:
    """One variable: ``conditional`` maps its parents' values to its distribution.

    A "deterministic" one maps them to a tensor, which is not compared; declare it as "latent" with
    a ``Delta`` to have it compared. An "input" has no conditional. The conditional of a variable
    without parents takes no argument and gives the distribution of one row.
    """

    name: str
    parents: Sequence[str] = ()
    kind: NodeKind = "latent"
    conditional: Callable[..., Any] | None = None


class DGM(nn.Module):
    """A directed graphical model; its conditionals that are modules are its parameters.

    Raises ValueError for a name that comes twice, a parent that does not come before, and a
    conditional that is missing or too much.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__()
        seen: set[str] = set()
        for node in nodes:
            _check(node, seen)
            seen.add(node.name)
        self.nodes = tuple(nodes)
        self.conditionals = nn.ModuleDict(
            {
                node.name: node.conditional
                for node in nodes
                if isinstance(node.conditional, nn.Module)
            }
        )

    def forward(self, run: Trace) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for node in self.nodes:
            values[node.name] = _value(node, [values[parent] for parent in node.parents], run)
        return values


def _value(node: Node, parents: Sequence[Tensor], run: Trace) -> Tensor:
    if node.conditional is None:
        return run.input(node.name)
    given = node.conditional(*parents)
    if node.kind == "deterministic":
        value: Tensor = given
        return value
    if not parents:
        given = _on_rows(given, run.num_rows)
    return run.latent(node.name, given) if node.kind == "latent" else run.target(node.name, given)


def _on_rows(law: Distribution, num_rows: int) -> Distribution:
    expanded: Distribution = law.expand((num_rows, *law.batch_shape))
    return expanded


def _check(node: Node, seen: set[str]) -> None:
    if node.name in seen:
        raise ValueError(f"two nodes are named {node.name!r}")
    missing = [parent for parent in node.parents if parent not in seen]
    if missing:
        raise ValueError(
            f"node {node.name!r} has the parents {missing}, which are not declared before it; "
            "list the nodes from causes to effects"
        )
    if (node.conditional is None) != (node.kind == "input"):
        expected = "no conditional" if node.kind == "input" else "a conditional"
        raise ValueError(f"node {node.name!r} of kind {node.kind!r} needs {expected}")
