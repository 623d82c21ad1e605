"""What a run's numbers depend on, as a digest by which its folder and its MLflow run are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.augment import VERSION as VIEWS_VERSION
from pipelines.custom_losses import FLAG, code_identity, is_custom
from pipelines.datasets import LATER, DataConfig
from pipelines.digests import digest, file_digest

if TYPE_CHECKING:
    from pipelines.config import RunConfig

# the test part is looked at after training, when every number is decided
_NO_MATTER_OF_DATA = {"download", "spool", "test"}
_NO_MATTER = {"name", "runs", "caches", "save_every", FLAG}


def identity_of(run: RunConfig) -> str:
    """Twelve hex digits of every value that decides the numbers, weights files by content.

    A teacher's term of weight 0 is left out, and a teacher that no term listens to with it: the
    control of every sweep is one run. A dataset counts by its name and root, not its content. What
    came later and is as it was before counts for nothing, so that old runs are found.
    """
    content = run.model_dump(mode="json", exclude=_NO_MATTER)
    content["data"] = data_identity(run.data)
    if run.min_workers is None:
        del content["min_workers"]
    content["student"]["weights"] = file_digest(run.student.weights)
    content["losses"] = {label: content["losses"][label] for label in run.active}
    for label, term in run.active.items():
        if is_custom(term.loss):
            content["losses"][label]["code"] = code_identity(term.loss)
    del content["synthetic"]
    if run.synthetic is not None:
        content["synthetic"] = run.synthetic.identity_content(run.batch_size)
    _identify_teachers(run, content)
    return digest(content)[:12]


def data_identity(data: DataConfig) -> dict[str, Any]:
    """Every value that decides which pictures are seen and how."""
    kept = data.model_dump(mode="json", exclude=_NO_MATTER_OF_DATA)
    for key in LATER:
        if kept[key] == DataConfig.model_fields[key].default:
            del kept[key]
    if data.views and VIEWS_VERSION > 1:  # which runs had before versions counted
        kept["augment"]["version"] = VIEWS_VERSION
    return kept


def _identify_teachers(run: RunConfig, content: dict[str, Any]) -> None:
    """Put in who is heard and by whom, by place in the list: labels are only names.

    A teacher that alone is heard counts as the run's only one.
    """
    heard = list(run.heard)
    teachers = [run.heard[label].identity_content for label in heard]
    content["teacher"] = teachers if len(heard) > 1 else teachers[0] if heard else None
    if not run.hears_average:
        del content["ensemble"]
    if not run.diagnostics.bounds:
        content["diagnostics"]["teacher"] = None
    joins = [content["student"][form] for form in run.student.joins]
    synthetic = [content["synthetic"]] if run.synthetic is not None else []
    listeners = [*content["losses"].values(), *joins, *synthetic, content["diagnostics"]]
    for listener in listeners:
        name = listener.pop("teacher")
        if len(heard) > 1 and name is not None:
            listener["teacher"] = heard.index(name)
