"""Several teachers of one student: which are made ready, who hears whom, and what it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from kdcore.losses import LOSSES, Stateful, Term
from kdcore.terms import feature_of, present
from kdcore.types import Batch, Outputs, Probe
from pipelines import cli, jobs
from pipelines.build import build_step, build_teacher, checked
from pipelines.cache.manifest import contents, fingerprint
from pipelines.config import RunConfig
from pipelines.console import console, print_outcome
from pipelines.costs import Cost
from pipelines.data import Reader, TeacherRows, view_of
from pipelines.digests import plain
from pipelines.loop import LAST, Metrics
from pipelines.models import build_network, save_weights
from pipelines.networks import ModelConfig
from pipelines.ranking import RankedTeacher
from pipelines.report import Trial
from pipelines.sources import Pictures, read_pictures
from pipelines.space import SweepConfig, changed
from pipelines.strict import validated
from pipelines.sweep import Outcome, shared_inputs
from pipelines.tracking import Tracker
from pipelines.train import Finished, Inputs, Teacher, train_here
from pipelines.training import with_teachers
from pipelines.views import normalised
from tests.timeless import timeless

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "student": {"name": "convnet", "params": {"width": 3}},
    "data": {"name": "digits", "limit": 100, "validation": 0.2, "views": 1, "augment": {"crop": 1}},
    "epochs": 1,
    "batch_size": 16,
    "optimizer": {"lr": 0.01},
}
WIDTHS = {"big": 6, "small": 4}
# a term on features of each teacher, and one on the average of both
MIXED: dict[str, Any] = {
    "ce": {},
    "kd": {},
    "mid": {"loss": "mse", "teacher": "big", "layers": {"block2": "block2"}},
    "near": {"loss": "mse", "teacher": "small"},
}


def watch(stage: str, done: int, total: int, note: str) -> None:
    pass


def no_word(metrics: Metrics) -> None:
    pass


@pytest.fixture(autouse=True)
def folder(workdir: Path) -> Path:
    """A working directory with weights of both teachers, untrained but strong of opinion."""
    for label, width in WIDTHS.items():
        model = ModelConfig(name="convnet", params={"width": width})
        net = build_network(model, num_classes=10, in_channels=1)
        classifier = net.get_submodule("classifier")
        assert isinstance(classifier, nn.Linear)
        with torch.no_grad():
            classifier.weight.mul_(20)
        save_weights(net.state_dict(), workdir / f"{label}.safetensors")
    return workdir


def teacher_of(like: str, **changes: Any) -> dict[str, Any]:
    network = {"name": "convnet", "params": {"width": WIDTHS[like]}}
    own = {"label": like, "weights": f"{like}.safetensors", "source": "live"}
    return {**network, **own, **changes}


def run_of(losses: dict[str, Any], *teachers: dict[str, Any], **changes: Any) -> RunConfig:
    listed = list(teachers) or [teacher_of(label) for label in WIDTHS]
    content = {**BASE, "teacher": listed, "losses": losses, **changes}
    return validated(RunConfig, content, where="toy")


def made_ready(run: RunConfig) -> Inputs:
    """The run's inputs, without Ray: caches are of float16 as on disk, but kept here."""
    pictures = read_pictures(run.data, "train")
    teachers = {}
    for label, teacher in run.teachers.items():
        tapped = build_teacher(teacher, pictures, run.teacher_layers.get(label, ()))
        if teacher.source == "live":
            teachers[label] = Teacher(Path("none"), live=tapped)
            continue
        every, said = np.arange(len(pictures.label)), []
        for number in range(run.data.views + 1):
            image = view_of(run, pictures, every, number)
            said.append(tapped(normalised(image, mean=run.data.mean, std=run.data.std)))
        features = {
            layer: np.stack([outputs.features[layer].half().numpy() for outputs in said])
            for layer in said[0].features
        }
        logits = np.stack([outputs.logits.half().numpy() for outputs in said])
        rows = TeacherRows(logits, features, said[0].classifier)
        teachers[label] = Teacher(Path("none"), rows=rows)
    return Inputs(pictures, teachers)


def trained(run: RunConfig, place: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What the run reports, and the student that it makes."""
    here = changed(run, {"runs": place})
    result = train_here(here, made_ready(run), no_word)
    history = [timeless(metrics) for metrics in result.history]
    return history, load_file(result.folder / LAST)


def exactly(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- who is made ready ------------------------------------------------------------------------


def test_a_teacher_that_nobody_hears_is_not_made_ready() -> None:
    heard = run_of({"ce": {}, "kd": {"teacher": "big"}})
    inputs = jobs.prepared(heard, watch=watch, tracker=Tracker())
    assert list(inputs.teachers) == ["big"]
    control = changed(heard, {"losses.kd.weight": 0, "teacher.0.source": "cached"})
    inputs = jobs.prepared(control, watch=watch, tracker=Tracker())
    assert (dict(inputs.teachers), inputs.fingerprint) == ({}, "")
    assert not Path("caches").exists()
    with pytest.raises(ValueError, match="listens to teacher 'big', which was not made ready"):
        inputs.only(heard.heard)


def test_every_teacher_is_tapped_where_its_own_terms_listen() -> None:
    inputs = jobs.prepared(run_of(MIXED), watch=watch, tracker=Tracker())
    layers = {label: held.live and held.live.layers for label, held in inputs.teachers.items()}
    assert layers == {"big": ("block2",), "small": ()}


def test_a_sweep_s_teachers_have_the_layers_of_all_trials_that_name_them() -> None:
    space = {
        "losses.mid.teacher": {"grid": ["big", "small"]},
        "losses.near.layers": {"grid": [{"block1": "block1"}, {"block3": "block3"}]},
        "teacher.0.precision": {"grid": ["fp32", "bf16"]},
    }
    config = SweepConfig(base=run_of(MIXED), space=space)
    shared = shared_inputs(config, watch=watch, tracker=Tracker())
    assert len(shared) == 2  # the teachers of either precision
    for inputs in shared.values():
        layers = {label: held.live and held.live.layers for label, held in inputs.teachers.items()}
        assert {label: set(names or ()) for label, names in layers.items()} == {
            "big": {"block2"},
            "small": {"block1", "block2", "block3"},
        }


def test_a_teacher_that_a_trial_does_not_hear_is_not_run() -> None:
    inputs = made_ready(run_of(MIXED))
    seen: dict[str, int] = dict.fromkeys(WIDTHS, 0)

    def count(label: str) -> None:
        seen[label] += 1

    for label, held in inputs.teachers.items():
        assert held.live is not None
        held.live.register_forward_hook(lambda *_, label=label: count(label))
    train_here(run_of({"ce": {}, "kd": {"teacher": "small"}}), inputs, no_word)
    assert seen == {"big": 0, "small": 5}  # of 80 pictures in batches of 16


def test_a_listed_teacher_has_the_cache_that_it_has_alone() -> None:
    two, pictures = run_of(MIXED), read_pictures(run_of(MIXED).data, "train")
    for label, teacher in two.teachers.items():
        tapped = build_teacher(teacher, pictures, ("block2",))
        alone = run_of({"kd": {}}, teacher_of(label))
        content = contents(two.taught_by(label), pictures, tapped)
        assert content == contents(alone.taught_by(label), pictures, tapped)


def test_runs_and_caches_of_one_teacher_keep_their_names() -> None:
    # runs as of commit c755d84, before one could have several teachers, caches as of schema 2:
    # other digests here mean that nothing which was trained or cached before is found again
    told = {"weight": 0.5, "params": {"temperature": 2}}
    teacher = {"run": {**BASE, "losses": {"ce": {}}}}
    run = validated(RunConfig, {**BASE, "teacher": teacher, "losses": {"kd": told}}, where="toy")
    assert run.folder.name == "run-2fd8c0cacffa"
    pictures = Pictures(np.zeros((20, 1, 8, 8), dtype=np.uint8), np.arange(20) % 5, 5)
    tapped = build_teacher(run.teachers["run"], pictures, ("block1",))
    with torch.no_grad():
        for held in tapped.net.state_dict().values():
            held.fill_(1)
    content = contents(run, pictures, tapped)
    assert fingerprint(content) == "2330f6d838709054"


# --- who hears whom ---------------------------------------------------------------------------


def test_two_equal_teachers_are_one() -> None:
    losses = {"ce": {}, "kd": {"params": {"temperature": 2}}}
    alone = trained(run_of(losses, teacher_of("big")), "alone")
    pair = [teacher_of("big", label=label) for label in ("one", "other")]
    exactly(trained(run_of(losses, *pair, ensemble="logits"), "logits"), alone)
    likely, weights = trained(run_of(losses, *pair, ensemble="probabilities"), "likely")
    for here, there in zip(likely, alone[0], strict=True):
        assert here == pytest.approx(there, rel=1e-4)
    torch.testing.assert_close(weights, alone[1], rtol=1e-4, atol=1e-5)


def test_the_space_of_the_average_matters_to_teachers_who_differ() -> None:
    told = [trained(run_of({"kd": {}}, ensemble=s), s)[0] for s in ("logits", "probabilities")]
    assert told[0][0]["train/kd"] != pytest.approx(told[1][0]["train/kd"], rel=1e-3)


def test_a_student_of_one_of_two_teachers_is_that_teacher_s_alone() -> None:
    losses = {"ce": {}, "kd": {"teacher": "small"}, "mid": {**MIXED["mid"], "teacher": "small"}}
    two, one = run_of(losses), run_of(losses, teacher_of("small"))
    assert two.identity == one.identity
    exactly(trained(two, "two"), trained(one, "one"))


def test_every_term_hears_its_own_teacher() -> None:
    run = run_of(MIXED)
    inputs = made_ready(run)
    step = build_step(run, inputs.pictures)
    reader = Reader(run, inputs.pictures, inputs.rows)
    batch = next(with_teachers(run, reader.train(0), inputs.live(CPU), CPU))
    parts = step(batch).parts
    for label, name in {"mid": "big", "near": "small"}.items():
        tapped = inputs.teachers[name].live
        assert tapped is not None
        student, said = step.student(batch.image), tapped(batch.image)
        (project,) = step.terms[label].projectors
        layer = "block2" if label == "mid" else "embedding"
        expected = (project(student.features[layer]) - said.features[layer]).square().mean()
        torch.testing.assert_close(parts[label], expected.detach())


@pytest.mark.parametrize("sources", [("cached", "cached"), ("cached", "live")])
def test_cached_and_live_teachers_teach_the_same_together(sources: tuple[str, str]) -> None:
    mixed = [
        teacher_of(label, source=source) for label, source in zip(WIDTHS, sources, strict=True)
    ]
    live, _ = trained(run_of(MIXED), "live")
    held, _ = trained(run_of(MIXED, *mixed), "mixed")
    for here, there in zip(held, live, strict=True):
        for name in ("train/kd", "train/mid", "train/near", "val/nll"):
            assert here[name] == pytest.approx(there[name], rel=1e-2), name  # half precision


def test_every_teacher_has_its_own_precision() -> None:
    run = run_of({"kd": {}}, teacher_of("big"), teacher_of("small", precision="bf16"))
    inputs = made_ready(run)
    reader = Reader(run, inputs.pictures, inputs.rows)
    batch = next(with_teachers(run, reader.train(0), inputs.live(CPU), CPU))
    types = {label: said.logits.dtype for label, said in batch.teachers.items()}
    assert types == {"big": torch.float32, "small": torch.bfloat16}
    assert batch.teacher is not None
    assert batch.teacher.logits.dtype is torch.float32


# --- what is shown ----------------------------------------------------------------------------


@pytest.mark.parametrize(("named", "width"), [(None, 6), ("small", 4)])
def test_the_figure_places_the_student_beside_one_teacher(named: str | None, width: int) -> None:
    run = run_of(MIXED, diagnostics={"teacher": named})
    inputs = made_ready(run)
    result = train_here(run, inputs, no_word)
    pair = jobs.matched_student(run, result, inputs)
    assert pair.student.shape == (20, 4 * 3)
    assert pair.teacher.shape == (20, 4 * width)
    assert len(pair.teacher_head.weight[0]) == 4 * width


def test_bounds_are_those_of_the_teacher_that_diagnostics_name() -> None:
    student = {"name": "convnet", "params": {"width": 4}}
    watched = {"bounds": True, "teacher": "small", "rows": 20}
    losses = {"ce": {}, "kd": {"teacher": "small"}}
    both = run_of(losses, student=student, diagnostics=watched)
    alone = run_of(losses, teacher_of("small"), student=student, diagnostics=watched)
    exactly(trained(both, "both"), trained(alone, "alone"))
    wide = run_of(losses, student=student, diagnostics={**watched, "teacher": "big"})
    with pytest.raises(ValueError, match=r"student's is 16, the teacher's 24"):
        build_step(wide, read_pictures(wide.data, "train"))


def ranked_teacher(title: str, metrics: Metrics) -> RankedTeacher:
    return RankedTeacher(title, "convnet", "", "", metrics, Cost(1, 1, 1.0))


def test_the_table_has_a_line_for_every_teacher() -> None:
    run = run_of(MIXED)
    outcome = Outcome(
        [],
        [],
        [],
        teachers=[
            ranked_teacher("teacher big", {"val/top1": 0.75, "test/top1": 0.5}),
            ranked_teacher("teacher small", {"test/top1": 0.25}),
        ],
        best=Trial(run, {}, {}, is_whole=True),
        student=Finished(Path(), [], {}),
        test={"test/top1": 0.125},
        folder=Path(),
    )
    with console.capture() as capture:
        print_outcome("toy", "val/top1", outcome)
    shown = capture.get()
    rows = [line.split("│")[2:4] for line in shown.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [["teacher big", "0.7500"]]
    assert "student 0.1250, teacher big 0.5000, teacher small 0.2500" in shown


def test_check_says_who_hears_whom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(plain(run_of(MIXED))))
    result = CliRunner().invoke(cli.app, ["check", str(path)])
    assert result.exit_code == 0, result.stderr
    assert "mid: 1.0 x mse {} {'block2': 'block2'} from teacher big\n" in result.stdout
    assert "kd: 0.9 x kd {'temperature': 4.0}\n" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses.mid.layers": {"block2": "blok2"}}, r"^teacher big: unknown layer .*'blok2'"),
        ({"teacher.1.params.width": 5}, r"^teacher small: weights small.safetensors are not of"),
        ({"teacher.1.weights": "no.pth"}, r"^teacher small: no weights at no.pth"),
    ],
)
def test_what_does_not_fit_one_of_the_teachers_is_refused_by_its_label(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checked(changed(run_of(MIXED), change))


def test_a_term_that_finds_no_features_in_the_average_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Remembering(Term):
        def __init__(self, probe: Probe) -> None:
            super().__init__()
            self.width = feature_of("teacher", present(probe.batch.teacher), "embedding").shape[1]

        def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
            return student.logits.sum()

    monkeypatch.setitem(LOSSES, "remembering", Stateful(Remembering))
    run = run_of({"it": {"loss": "remembering"}})
    with pytest.raises(ValueError, match=r"^losses\.it: layer 'embedding' is asked of the teacher"):
        build_step(run, read_pictures(run.data, "train"))
    named = changed(run, {"losses.it.teacher": "big"})
    assert build_step(named, read_pictures(run.data, "train")).terms["it"].width == 24


def test_nothing_is_cached_of_teachers_that_are_live(folder: Path) -> None:
    path = folder / "live.yaml"
    path.write_text(yaml.safe_dump(plain(run_of(MIXED))))
    result = CliRunner().invoke(cli.app, ["cache", str(path)])
    assert result.exit_code == 2
    assert "no loss listens to a cached teacher: nothing to cache" in result.stderr


# --- from nothing to a student ----------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_a_run_makes_its_teachers_and_their_caches_and_learns_from_both(folder: Path) -> None:
    theirs = {**BASE, "name": "earlier", "losses": {"ce": {}}}
    losses = {"ce": {}, "kd": {}, "mid": {**MIXED["mid"], "teacher": "earlier"}}
    run = run_of(losses, {"run": theirs}, teacher_of("small", source="cached"))
    told: list[str] = []
    result = jobs.train(
        run, watch=lambda stage, *rest: told.append(stage), tracker=(tracker := Tracker())
    )
    assert set(result.history[0]) >= {"train/ce", "train/kd", "train/mid"}
    assert list(dict.fromkeys(told)) == ["earlier", "cache earlier", "cache small", "run"]
    assert (result.folder / "embedding.png").is_file()  # the first teacher is as wide

    (found,) = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.`kd.identity` = '{run.identity}'"
    )
    fingerprints = found.data.tags["kd.cache"].split()
    assert sorted(path.name for path in Path("caches").iterdir()) == sorted(fingerprints)
    layers = [
        sorted(path.name for path in (Path("caches") / name / "layers").iterdir())
        for name in fingerprints
    ]
    assert layers == [["block2", "embedding"], ["embedding"]]

    live = changed(run, {f"teacher.{place}.source": "live" for place in (0, 1)})
    again = train_here(live, jobs.prepared(live, watch=watch, tracker=tracker), no_word)
    for here, there in zip(result.history, again.history, strict=True):
        for name in ("train/kd", "train/mid", "val/nll"):
            assert here[name] == pytest.approx(there[name], rel=1e-2), name  # half precision
