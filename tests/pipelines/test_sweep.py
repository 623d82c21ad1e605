from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from mlflow.entities import Run

from pipelines import sweep as sweeps
from pipelines.build import checked
from pipelines.config import RunConfig
from pipelines.following import Follow
from pipelines.loading import load
from pipelines.report import Trial, best_trial, ranked
from pipelines.sharing import inputs_key
from pipelines.space import SweepConfig, changed, points
from pipelines.standing import Standing, unseen
from pipelines.sweep import Outcome, best_run, shared_inputs, sweep
from pipelines.tracking import Tracker
from pipelines.train import Inputs

GRID = {
    "losses.distill.loss": {"grid": ["kd", "mse", "w2"]},
    "losses.distill.weight": {"grid": [0, 1]},
    "seed": {"grid": [0, 1]},
}


def watch(stage: str, done: int, total: int, note: str) -> None:
    pass


def swept(folder: Path, toy_run: Path, **content: object) -> SweepConfig:
    path = folder / "toy_sweep.yaml"
    path.write_text(yaml.safe_dump({"base": str(toy_run), **content}))
    loaded = load(path)
    assert isinstance(loaded, SweepConfig)
    return loaded


def untaught(config: SweepConfig, **changes: object) -> SweepConfig:
    """The sweep without teacher and cache, where these are not what is tested."""
    base = changed(config.base, {"teacher": None, "losses": {"ce": {}}, **changes})
    return config.model_copy(update={"base": base})


def run_sweep(config: SweepConfig) -> Outcome:
    return sweep(config, watch=watch, tracker=Tracker(), verbose=False)


def children(tracker: Tracker) -> tuple[Run, list[Run]]:
    """The newest sweep's parent run and its trials."""
    runs = tracker.client.search_runs([tracker.experiment_id])
    parent = next(run for run in runs if run.data.tags.get("kd.kind") == "sweep")
    key = "mlflow.parentRunId"
    return parent, [run for run in runs if run.data.tags.get(key) == parent.info.run_id]


@pytest.mark.usefixtures("local_ray")
def test_a_sweep_runs_once_per_configuration_and_is_all_in_mlflow(
    workdir: Path, toy_run: Path
) -> None:
    config = swept(workdir, toy_run, space=GRID)
    outcome = run_sweep(config)

    assert [len(row.values) for row in outcome.rows] == [2, 2, 2, 2]  # three losses, one control
    assert [row.is_control for row in outcome.rows].count(True) == 1
    means = [row.mean for row in outcome.rows]
    assert means == sorted(means, reverse=True)
    assert outcome.best.metrics["val/top1"] == max(outcome.rows[0].values)
    assert outcome.student.best["val/top1"] == max(outcome.rows[0].values)
    assert not outcome.failed
    (teacher,) = outcome.teachers
    assert {"val/top1", "test/top1"} <= teacher.metrics.keys()

    parent, trials = children(Tracker())
    assert len(trials) == 8
    for trial in trials:
        assert trial.info.status == "FINISHED"
        assert trial.data.params["data.augment.crop"] == "1"
        assert trial.data.params["teacher.run.student.params.width"] == "8"
        assert trial.data.tags["kd.cache"]
        history = Tracker().client.get_metric_history(trial.info.run_id, "val/top1")
        assert [point.step for point in history] == [1, 2]
    assert parent.data.metrics["test/top1"] == outcome.test["test/top1"]
    assert best_run(config).folder.absolute() == outcome.student.folder.absolute()
    logged = {file.path for file in Tracker().client.list_artifacts(parent.info.run_id)}
    drawn = {"curves.png", "parallel.png", "costs.png", "report.html"}
    assert drawn | {"ranking.json", "student.onnx", "student.pt2"} <= logged
    assert "kd.export" not in parent.data.tags
    assert "model_card.md" in logged
    champion = Tracker().client.get_model_version_by_alias("toy_sweep", "champion")
    assert champion.run_id == parent.info.run_id
    assert champion.description.startswith("# Best student of sweep toy_sweep")
    for trial in trials:  # the control hears no teacher
        taught = float(trial.data.params["losses.distill.weight"]) > 0
        kinds = sorted(held.tags[0].value for held in trial.inputs.dataset_inputs)
        assert kinds == ["teacher cache", "training"][not taught :]

    before = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/state.pt")}
    again = run_sweep(config)
    assert len(children(Tracker())[1]) == 8, "a second call logged its trials again"
    assert len(Tracker().client.search_runs([Tracker().experiment_id])) == 10
    assert len(Tracker().client.search_model_versions("name = 'toy_sweep'")) == 1
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/state.pt")}
    assert [row.values for row in again.rows] == [row.values for row in outcome.rows]
    assert not list(Path("runs").glob(".tune-*"))


@pytest.mark.usefixtures("local_ray")
def test_optuna_and_asha_leave_whole_trials_to_be_ranked(workdir: Path, toy_run: Path) -> None:
    config = swept(
        workdir,
        toy_run,
        space={
            "losses.distill.weight": {"loguniform": [0.1, 10]},
            "losses.distill.loss": {"choice": ["kd", "w2"]},
        },
        search={"algorithm": "optuna", "num_samples": 4, "scheduler": "asha"},
    )
    outcome = run_sweep(config)
    _, trials = children(Tracker())
    assert len(trials) == 4
    killed = [trial for trial in trials if trial.info.status == "KILLED"]
    assert len(killed) == len(outcome.stopped)
    assert sum(len(row.values) for row in outcome.rows) + len(outcome.stopped) == 4
    assert outcome.student.history[-1]["epoch"] == config.base.epochs
    drawn = {float(trial.data.params["losses.distill.weight"]) for trial in trials}
    assert len(drawn) == 4
    assert all(0.1 <= weight <= 10 for weight in drawn)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_trial_with_workers_of_its_own_does_not_hold_their_cpus(
    workdir: Path, toy_run: Path
) -> None:
    config = swept(workdir, toy_run, space={"seed": {"grid": [1]}})
    config = untaught(config, workers=2, epochs=1)
    outcome = run_sweep(config)
    assert [len(row.values) for row in outcome.rows] == [1]
    _, trials = children(Tracker())
    assert [trial.data.metrics["epoch"] for trial in trials] == [1]


@pytest.mark.usefixtures("local_ray")
def test_a_trial_that_fails_is_named_and_the_others_are_ranked(
    workdir: Path, toy_run: Path
) -> None:
    config = untaught(swept(workdir, toy_run, space={"optimizer.lr": {"grid": [0.1, 1e30]}}))
    outcome = run_sweep(config)
    assert len(outcome.rows) == 1
    assert [trial.changes for trial in outcome.failed] == [{"optimizer.lr": 1e30}]
    assert "lower optimizer.lr" in outcome.failed[0].error
    _, trials = children(Tracker())
    assert sorted(trial.info.status for trial in trials) == ["FAILED", "FINISHED"]
    summary = json.loads((outcome.folder / "ranking.json").read_text())
    assert summary["failed"][0]["changes"] == {"optimizer.lr": 1e30}


@pytest.mark.usefixtures("local_ray")
def test_one_cache_serves_the_layers_of_all_trials(workdir: Path, toy_run: Path) -> None:
    layers = [{"block1": "block1"}, {"block2": "block3"}]
    config = swept(
        workdir,
        toy_run,
        space={"losses.mid": {"grid": [{"loss": "mse", "layers": pair} for pair in layers]}},
    )
    (inputs,) = shared_inputs(config, watch=watch, tracker=Tracker()).values()
    (rows,) = inputs.rows.values()
    assert set(rows.features) == {"block1", "block3", "embedding"}
    assert len(list(Path("caches").iterdir())) == 1


def test_a_value_that_fits_no_network_is_refused_before_the_teacher_is_trained(
    workdir: Path, toy_run: Path
) -> None:
    config = swept(
        workdir,
        toy_run,
        space={"losses.mid": {"grid": [{"loss": "mse", "layers": {"block9": "block1"}}]}},
    )
    with pytest.raises(ValueError, match=r"student: unknown layer .*'block9'; did you mean 'block"):
        run_sweep(config)
    assert not Path("runs").exists()


def test_the_grid_is_every_combination_and_weight_zero_is_one_control(
    toy_run: Path, workdir: Path
) -> None:
    config = swept(workdir, toy_run, space=GRID)
    assert math.prod(len(values.given) for values in config.space.values()) == 12
    found = points(config)
    assert len({tuple(sorted(point.items())) for point in found}) == len(found) == 8


def trial(run: RunConfig, value: float, **changes: object) -> Trial:
    return Trial(changed(run, changes), changes, {"val/top1": value}, is_whole=True)


def test_ranking_is_by_the_mean_over_seeds(toy_run: Path) -> None:
    run = load(toy_run)
    assert isinstance(run, RunConfig)
    weight = "losses.distill.weight"
    trials = [
        trial(run, 0.9, **{weight: 1.0, "seed": 0}),
        trial(run, 0.1, **{weight: 1.0, "seed": 1}),
        trial(run, 0.6, **{weight: 0.0, "seed": 0}),
        trial(run, 0.8, **{weight: 0.0, "seed": 1}),
        trial(run, 0.8, **{weight: 0.0, "seed": 1}),  # the same again is no further seed
        Trial(run, {}, {"val/top1": 0.99}, is_whole=False),
        Trial(run, {}, {}, is_whole=False, error="boom"),
    ]
    rows = ranked(trials, metric="val/top1", mode="max")
    assert [row.label for row in rows] == ["no distillation (control)", "weight=1"]
    assert [row.mean for row in rows] == pytest.approx([0.7, 0.5])
    assert rows[0].deviation == pytest.approx(math.sqrt(0.02))
    assert best_trial(rows[0], mode="max").metrics["val/top1"] == 0.8
    backwards = ranked(trials, metric="val/top1", mode="min")
    assert [row.mean for row in backwards] == pytest.approx([0.5, 0.7])
    with pytest.raises(ValueError, match=r"unknown metric 'val/top'; did you mean 'val/top1'"):
        ranked(trials, metric="val/top", mode="max")


def test_a_configuration_that_lacks_a_seed_comes_last(toy_run: Path) -> None:
    run = load(toy_run)
    assert isinstance(run, RunConfig)
    lr = "optimizer.lr"
    lucky = [trial(run, 0.9, **{lr: 0.1, "seed": 0})]
    lucky += [Trial(changed(run, {lr: 0.1, "seed": s}), {}, {}, is_whole=False) for s in (1, 2)]
    steady = [trial(run, 0.8, **{lr: 0.2, "seed": seed}) for seed in range(3)]
    rows = ranked([*lucky, *steady], metric="val/top1", mode="max")
    assert [(row.mean, row.lacking) for row in rows] == [(pytest.approx(0.8), 0), (0.9, 2)]


def test_a_row_is_called_by_its_variant_and_only_a_plain_student_is_a_control(
    toy_run: Path, workdir: Path
) -> None:
    alone = {"losses.distill.weight": 0}
    branches = {"student.branches": {"stages": ["block3"], "count": 2}}
    variants = {"alone": alone, "wide": {**alone, **branches}, "taught": {}}
    config = swept(workdir, toy_run, variants=variants, space={"seed": {"grid": [1, 2]}})
    trials = [
        Trial(config.run(point), point, {"val/top1": 0.5}, is_whole=True)
        for point in points(config)
    ]
    rows = ranked(trials, metric="val/top1", mode="max")
    assert sorted((row.label, row.is_control, len(row.values)) for row in rows) == [
        ("no distillation (control)", True, 2),
        ("taught", False, 2),
        ("wide", False, 2),
    ]
    assert {row.setting for row in rows} == {""}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_random_search_draws_the_same_again(workdir: Path, toy_run: Path) -> None:
    config = swept(
        workdir,
        toy_run,
        space={"optimizer.lr": {"loguniform": [0.01, 0.1]}},
        search={"algorithm": "random", "num_samples": 2},
    )
    first, second = run_sweep(untaught(config)), run_sweep(untaught(config))
    assert [row.label for row in first.rows] == [row.label for row in second.rows]
    assert len(list(Path("runs").glob("toy-*"))) == 2


@pytest.mark.usefixtures("local_ray")
def test_a_sweep_that_is_broken_off_goes_on_where_it_was(workdir: Path, toy_run: Path) -> None:
    search = {"max_concurrent": 2}
    config = untaught(swept(workdir, toy_run, space={"seed": {"grid": [0, 1, 2]}}, search=search))

    def break_off(standing: Standing) -> None:
        if standing.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(config, watch=watch, show=break_off, tracker=Tracker(), verbose=False)
    parent, trials = children(Tracker())
    assert parent.info.status == "KILLED"
    assert len(trials) <= 2, "more trials were at work than `max_concurrent` allows"
    assert "RUNNING" not in {trial.info.status for trial in trials}
    assert not list(Path("runs").glob("sweeps/*/ranking.json"))
    outcome = run_sweep(config)
    assert [len(row.values) for row in outcome.rows] == [3]
    parent, trials = children(Tracker())
    assert [run.info.status for run in (parent, *trials)] == ["FINISHED"] * 4


@pytest.mark.parametrize(
    ("workers", "scheduler", "asked"), [(2, "asha", True), (2, "none", False), (1, "asha", False)]
)
def test_the_dashboard_runs_where_only_it_frees_stopped_workers(
    workdir: Path,
    toy_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    scheduler: str,
    asked: bool,
) -> None:
    def start(*, verbose: bool, dashboard: bool) -> None:
        assert dashboard is asked
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "cluster", start)
    config = swept(workdir, toy_run, space={}, search={"scheduler": scheduler})
    config = config.model_copy(update={"base": changed(config.base, {"workers": workers})})
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config)


def test_a_run_that_a_search_proposes_twice_is_tracked_once(workdir: Path, toy_run: Path) -> None:
    config = untaught(swept(workdir, toy_run, space={}))
    tracker = Tracker()
    parent = tracker.start("sweep", params={}, tags={"kd.kind": "sweep"})
    inputs = {inputs_key(config.base): Inputs(checked(config.base))}
    standing = Standing(2, at_once=2, metric="val/top1", mode="max")
    follow = Follow(config, inputs, show=unseen, tracker=tracker, parent=parent, standing=standing)
    actor = SimpleNamespace(ray_actor=None)
    twins = [
        SimpleNamespace(
            trial_id=name, path=name, config={"point": {}}, last_result={}, temporary_state=actor
        )
        for name in ("first", "second")
    ]
    for trial in twins:  # side by side
        follow.on_trial_start(0, twins, trial)
    for epoch in (1, 2):
        for trial in twins:
            follow.on_trial_result(0, twins, trial, {"epoch": epoch, "val/top1": epoch / 4})
    _, (tracked,) = children(tracker)
    history = tracker.client.get_metric_history(tracked.info.run_id, "val/top1")
    assert [point.value for point in history] == [0.25, 0.5]


def test_how_a_trial_ends_is_told_to_people_and_to_mlflow(workdir: Path, toy_run: Path) -> None:
    config = untaught(swept(workdir, toy_run, space={"seed": {"grid": [0, 1, 2]}}))
    tracker = Tracker()
    parent = tracker.start("sweep", params={}, tags={"kd.kind": "sweep"})
    inputs = {inputs_key(config.base): Inputs(checked(config.base))}
    standing = Standing(3, at_once=3, metric="val/top1", mode="max")
    follow = Follow(config, inputs, show=unseen, tracker=tracker, parent=parent, standing=standing)

    def ended(seed: int, epoch: int, **more: int) -> str:
        point = {"point": {"seed": seed}, **more}
        trial = SimpleNamespace(
            path="", trial_id=f"{seed}{epoch}", config=point, last_result={"epoch": epoch}
        )
        follow.on_trial_complete(0, [], trial)
        identity = config.run({"seed": seed}).identity
        (run,) = (one for one in children(tracker)[1] if one.data.tags["kd.identity"] == identity)
        return str(run.info.status)

    assert ended(0, 1) == "KILLED"  # by a scheduler
    assert standing.ended == {"stopped early": 1}
    assert ended(1, 1, until=1) == "KILLED"  # a generation of a population is done, its run is not
    assert ended(1, 2, until=2) == "FINISHED"
    assert ended(2, 2) == "FINISHED"
    assert standing.ended == {"stopped early": 1, "finished": 3}
