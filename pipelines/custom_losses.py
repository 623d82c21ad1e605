"""The lines of losses: those of LOSSES, and ``module:attr`` of packages that are installed."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from functools import cache
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from kdcore.checks import unknown_name
from kdcore.losses import LOSSES, Loss

# of a run, which must say that it may be code from elsewhere
FLAG = "allow_custom_losses"


def is_custom(loss: str) -> bool:
    """Whether a loss is named as ``module:attr``."""
    return ":" in loss


def loss_line(loss: str) -> Loss:
    """The line of LOSSES of that name, or the one that ``module:attr`` is, which is imported.

    Whoever calls it knows that the run has allowed it: a run refuses before it asks.

    Raises ValueError for an unknown name, for what cannot be imported and for what is no line.
    """
    if not is_custom(loss):
        if loss not in LOSSES:
            raise ValueError(unknown_name("loss", loss, LOSSES))
        return LOSSES[loss]
    module, _, attribute = loss.partition(":")
    try:
        found = attrgetter(attribute)(_imported(loss))
    except AttributeError:
        raise ValueError(f"loss {loss!r}: {module} has no {attribute!r}") from None
    if not isinstance(found, Loss):
        raise ValueError(
            f"loss {loss!r} is of type {type(found).__name__}, expected a line such as LOSSES has: "
            "kdcore.losses.Logits(function), Features(function) or Stateful(Term)"
        )
    return found


@cache
def code_identity(loss: str) -> dict[str, str]:
    """What tells one version of a custom loss from another.

    The sha256 of its module's file, and the version of the distribution that brought it if there is
    one: what the module imports from elsewhere is seen in the latter only.
    """
    module = _imported(loss)
    package = module.__name__.partition(".")[0]
    known = {name: version(name) for name in packages_distributions().get(package, ())}
    source = Path(inspect.getfile(module))
    return {"source": hashlib.sha256(source.read_bytes()).hexdigest(), **known}


def _imported(loss: str) -> ModuleType:
    module = loss.partition(":")[0]
    _refuse_a_file_that_lies_here(loss, module.partition(".")[0])
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever the module itself does when it is imported
        raise ValueError(
            f"loss {loss!r} cannot be imported ({type(error).__name__}: {error}); install its "
            "package here and on every node"
        ) from None


def _refuse_a_file_that_lies_here(loss: str, package: str) -> None:
    """Else whoever may write where a run is started could have it run his code.

    A package that is installed from its folder is no such file: a distribution brings it.
    """
    found = find_spec(package) if package.isidentifier() else None
    lies_here = found is not None and Path.cwd() in Path(found.origin or "").parents[:2]
    if lies_here and package not in packages_distributions():
        raise ValueError(
            f"loss {loss!r}: {package} is a file of the working directory, not a package that is "
            "installed; `pip install --editable` it, here and on every node"
        )
