"""Dotted paths into a run, and sweeps that cannot hold a trial that is no run."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcore.losses import LOSSES, Logits
from pipelines.config import RunConfig
from pipelines.loading import load
from pipelines.ranges import Range
from pipelines.space import (
    SweepConfig,
    changed,
    neighbours,
    override,
)
from pipelines.space import points as points_of
from pipelines.strict import validated

TOY: dict[str, Any] = {
    "name": "toy",
    "student": {"name": "convnet", "params": {"width": 2}},
    "teacher": {"name": "resnet8", "weights": "teacher.safetensors"},
    "data": {"name": "digits"},
    "epochs": 2,
    "workers": 2,
    "losses": {"ce": {}, "it": {"loss": "kd", "params": {"temperature": 2.0}}},
}


def run_of(**changes: Any) -> RunConfig:
    return validated(RunConfig, {**deepcopy(TOY), **changes}, where="toy")


def sweep_of(space: dict[str, Any], **search: Any) -> SweepConfig:
    content = {"base": deepcopy(TOY), "space": space, "search": search}
    return validated(SweepConfig, content, where="sweep")


# --- override ---------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b", "c"])
VALUES = st.one_of(st.none(), st.integers(0, 9), st.lists(st.integers(0, 9), max_size=2))
CONTENTS = st.dictionaries(
    KEYS,
    st.recursive(
        VALUES, lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3), max_leaves=12
    ),
)
PATHS = st.lists(KEYS, min_size=1, max_size=4)


def leaves(content: dict[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, value in content.items():
        inner = value if isinstance(value, dict) and value else None
        found |= leaves(inner, (*above, key)) if inner else {(*above, key): value}
    return found


def at(content: Any, path: list[str]) -> Any:
    for key in path:
        content = content[key]
    return content


def meets_a_value(content: Any, path: list[str]) -> bool:
    """Whether the path goes on below something that is there and is no mapping."""
    for key in path[:-1]:
        content = content.get(key)
        if content is None:
            return False
        if not isinstance(content, dict):
            return True
    return False


@settings(deadline=None)
@given(content=CONTENTS, path=PATHS, value=VALUES)
def test_override_sets_the_path_and_nothing_else(
    content: dict[str, Any], path: list[str], value: Any
) -> None:
    dotted, before = ".".join(path), deepcopy(content)
    if meets_a_value(content, path):
        with pytest.raises(ValueError, match=rf"cannot set {re.escape(dotted)}: .*not a mapping"):
            override(content, dotted, value)
        return
    result = override(content, dotted, value)
    assert content == before
    assert at(result, path) == value
    on_the_way = {tuple(path[:depth]) for depth in range(1, len(path) + 1)}

    def aside(of: dict[str, Any]) -> dict[tuple[str, ...], Any]:
        return {
            leaf: held
            for leaf, held in leaves(of).items()
            if leaf not in on_the_way and leaf[: len(path)] != tuple(path)
        }

    assert aside(result) == aside(content)


@settings(deadline=None)
@given(content=CONTENTS, value=st.lists(st.integers(), min_size=1))
def test_override_shares_nothing_with_its_input(content: dict[str, Any], value: list[int]) -> None:
    content["kept"], held, before = {"inner": [1]}, list(value), deepcopy(value)
    result = override(content, "set.here", held)
    result["kept"]["inner"].append(2)
    held.append(0)
    assert content["kept"] == {"inner": [1]}
    assert result["set"]["here"] == before


def test_a_number_in_a_path_is_a_place_in_a_list() -> None:
    content = {"teacher": [{"name": "a"}, {"name": "b", "params": None}], "mean": [0.1, 0.2]}
    before = deepcopy(content)
    assert override(content, "teacher.1.params.width", 3) == {
        **content,
        "teacher": [{"name": "a"}, {"name": "b", "params": {"width": 3}}],
    }
    assert override(content, "mean.0", 0.5) == {**content, "mean": [0.5, 0.2]}
    assert content == before


@pytest.mark.parametrize("path", ["mean.2", "mean.-1", "mean.x", "teacher.1.name", "mean.0.x"])
def test_a_place_that_a_list_does_not_have_is_refused(path: str) -> None:
    message = rf"cannot set {re.escape(path)}: (mean|teacher|mean\.0) is .*, not a mapping"
    with pytest.raises(ValueError, match=message):
        override({"mean": [0.1, 0.2], "teacher": [{"name": "a"}]}, path, 1)


def test_changed_is_pure_and_validates() -> None:
    run = run_of()
    before = run.model_copy(deep=True)
    other = changed(run, {"student.params.width": 5, "optimizer.lr": 0.2})
    assert (other.student.params, other.optimizer.lr) == ({"width": 5}, 0.2)
    assert run == before
    with pytest.raises(ValueError, match=r"toy: optimizer\.lr: input should be greater than 0"):
        changed(run, {"optimizer.lr": 0})


# --- another loss under the same label --------------------------------------------------------


def test_another_loss_keeps_the_params_that_it_knows() -> None:
    term = changed(run_of(), {"losses.it.loss": "kd"}).losses["it"]
    assert term.params == {"temperature": 2.0}
    content = override({"params": {"temperature": 2.0, "label_smoothing": 0.1}}, "loss", "ce")
    assert content == {"params": {"label_smoothing": 0.1}, "loss": "ce", "layers": {}}


def test_another_loss_keeps_its_teacher_if_it_hears_one() -> None:
    run = run_of(losses={"it": {"loss": "kd", "teacher": "resnet8"}})
    heard = {
        loss: changed(run, {"losses.it.loss": loss}).losses["it"].teacher
        for loss in ("kd", "mse", "ce")
    }
    assert heard == {"kd": "resnet8", "mse": "resnet8", "ce": None}


@pytest.mark.parametrize(
    ("loss", "params"),
    [
        ("ce", {"label_smoothing": 0.0}),
        ("mse", {}),
        ("w2", {"normalise": "variance", "positions": "pool"}),
    ],
)
def test_another_loss_drops_the_params_that_it_does_not_know(
    loss: str, params: dict[str, Any]
) -> None:
    assert changed(run_of(), {"losses.it.loss": loss}).losses["it"].params == params


def test_another_loss_keeps_weight_and_layers_where_it_takes_layers() -> None:
    layers = {"block1": "layer1"}
    run = run_of(losses={"it": {"loss": "mse", "weight": 3, "layers": layers}})
    w2 = changed(run, {"losses.it.loss": "w2"}).losses["it"]
    assert (w2.loss, w2.weight, w2.layers) == ("w2", 3, layers)
    kd = changed(run, {"losses.it.loss": "kd"}).losses["it"]
    assert (kd.loss, kd.weight, kd.layers) == ("kd", 3, {})
    back = changed(changed(run, {"losses.it.loss": "kd"}), {"losses.it.loss": "mse"})
    assert back.losses["it"].layers == {"embedding": "embedding"}


def test_another_loss_has_its_own_defaults_where_the_old_one_had_its(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def softer(student: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
        return student

    monkeypatch.setitem(LOSSES, "softer", Logits(softer, weight=7.0))  # type: ignore[attr-defined]
    run = run_of(losses={"it": {"loss": "kd"}})
    softened = changed(run, {"losses.it.loss": "softer"}).losses["it"]
    assert (softened.weight, softened.params) == (7.0, {"temperature": 2.0})
    given = run_of(losses={"it": {"loss": "kd", "weight": 3, "params": {"temperature": 8}}})
    kept = changed(given, {"losses.it.loss": "softer"}).losses["it"]
    assert (kept.weight, kept.params) == (3.0, {"temperature": 8.0})


def test_params_of_the_new_loss_may_come_with_it() -> None:
    change = {"losses.it.loss": "w2", "losses.it.params.normalise": "none"}
    expected = {"normalise": "none", "positions": "pool"}
    assert changed(run_of(), change).losses["it"].params == expected


# --- sweeps -----------------------------------------------------------------------------------


def test_a_sweep_of_runs_loads_with_its_defaults() -> None:
    sweep = sweep_of({"seed": {"grid": [0, 1]}, "losses.it.loss": {"grid": ["kd", "w2"]}})
    assert sweep.search.metric == "val/top1"
    assert (sweep.search.mode, sweep.search.algorithm) == ("max", "grid")
    assert sweep.space["seed"].probes == [0, 1]
    assert sweep.base == run_of()


@pytest.mark.parametrize(
    ("path", "values", "named"),
    [
        ("epochs", {"grid": [1, 2, 0]}, "0 is no run: toy: epochs: input should be greater"),
        ("epochs", {"choice": [1, "x"]}, "'x' is no run: toy: epochs: input should be a valid"),
        ("optimizer.lr", {"uniform": [0, 1]}, "0.0 is no run: toy: optimizer.lr: input should"),
        ("data.validation", {"uniform": [0.1, 1]}, "1.0 is no run: toy: data.validation: input"),
        ("data.validation", {"loguniform": [0.1, 2]}, "2.0 is no run: toy: data.validation: "),
        ("epochs", {"randint": [0, 9]}, "0 is no run: toy: epochs: input should be greater"),
        ("batch_size", {"randint": [2, 4]}, "3 is no run: toy: batch_size 3 must be a multiple"),
        ("losses.it.loss", {"choice": ["kd", "kdd"]}, "'kdd' is no run: toy: losses.it: unknown"),
        ("losses.it.wieght", {"choice": [1]}, "1 is no run: toy: losses.it: unknown key"),
        ("epochs.x", {"choice": [1]}, "1 is no run: cannot set epochs.x: epochs is 2"),
        ("losses.it.params.temperature", {"choice": ["hot"]}, "'hot' is no run: toy: losses.it"),
    ],
)
def test_a_value_that_is_no_run_is_refused_before_anything_starts(
    path: str, values: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sweep: space.{path}: value {named}")) as error:
        sweep_of({"seed": {"choice": [0, 1]}, path: values}, algorithm="random")
    assert type(error.value) is ValueError


def test_the_high_end_of_randint_is_not_drawn() -> None:
    sweep = sweep_of({"batch_size": {"randint": [2, 5]}}, algorithm="random")
    assert sweep.space["batch_size"].probes == [2, 4]


@pytest.mark.parametrize("path", ["name", "runs", "caches", "workers"])
def test_what_is_the_same_for_all_trials_is_not_searched(path: str) -> None:
    with pytest.raises(ValueError, match=rf"space\.{path}: .* are the same for all trials"):
        sweep_of({path: {"grid": [1, 2]}})


def test_a_continuous_range_of_a_whole_number_is_refused() -> None:
    # both ends are whole, nearly every draw between them is not
    with pytest.raises(ValueError, match=r"space\.batch_size"):
        sweep_of({"batch_size": {"uniform": [16, 64]}}, algorithm="random")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "expected one of grid, choice, uniform, loguniform, quniform, randint, normal"),
        (
            {"grid": [1], "choice": [1]},
            "expected one of grid, choice, uniform, loguniform, quniform, randint, normal",
        ),
        ({"grid": []}, "grid: expected at least one value"),
        ({"gird": [1]}, "unknown key 'gird'; did you mean 'grid'?"),
        ({"uniform": [1, 0.1]}, "uniform: expected [low, high] with low < high, got (1.0, 0.1)"),
        ({"randint": [3, 3]}, "randint: expected [low, high] with low < high, got (3, 3)"),
    ],
)
def test_a_range_is_exactly_one_kind_of_values(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sweep: space.epochs: {named}")):
        sweep_of({"epochs": values}, algorithm="random")


def test_a_logarithm_needs_a_positive_low_end() -> None:
    with pytest.raises(ValueError, match=r"space\.optimizer\.lr\.loguniform\.0: .*, got 0"):
        sweep_of({"optimizer.lr": {"loguniform": [0, 1]}}, algorithm="random")


@pytest.mark.parametrize("kind", ["choice", "uniform", "loguniform", "randint"])
def test_a_grid_refuses_ranges(kind: str) -> None:
    message = r"space\.batch_size: algorithm grid takes `grid: \[\.\.\.\]` only"
    with pytest.raises(ValueError, match=message):
        sweep_of({"batch_size": {kind: [16, 64]}})


@pytest.mark.parametrize(
    ("search", "named"),
    [
        ({"algorithm": "bayes"}, "search.algorithm: input should be 'grid', 'random' or 'optuna'"),
        ({"metrics": "val/top1"}, "search: unknown key 'metrics'; did you mean 'metric'?"),
        ({"num_samples": 0}, "search.num_samples: input should be greater than 0, got 0"),
        ({"num_samples": 2}, "search.num_samples: a grid runs each point once; give `seeds`"),
    ],
)
def test_a_wrong_search_is_refused(search: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sweep: {named}")):
        sweep_of({}, **search)


def test_a_change_goes_to_the_sweep_or_to_its_base(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    (tmp_path / "some.yaml").write_text("base: toy.yaml\nspace: {seed: {grid: [0, 1]}}")
    changes = ["epochs=9", "name=mine", "search.seed=3", "base.batch_size=8"]
    sweep = load(tmp_path / "some.yaml", [*changes, "losses.ce.weight=2"])
    assert isinstance(sweep, SweepConfig)
    assert (sweep.name, sweep.search.seed, sweep.base.name) == ("mine", 3, "toy")
    assert (sweep.base.epochs, sweep.base.batch_size) == (9, 8)
    assert sweep.base.losses["ce"].weight == 2


def test_a_mistake_in_the_base_is_named(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**TOY, "epochs": 0}))
    (tmp_path / "some.yaml").write_text("base: toy.yaml\nspace: {}")
    with pytest.raises(ValueError, match=r"some\.yaml: base\.epochs: input should be greater"):
        load(tmp_path / "some.yaml")


# --- variants ---------------------------------------------------------------------------------

VARIANTS: dict[str, Any] = {
    "control": {"losses.it.weight": 0},
    "hot": {"losses.it.params.temperature": 8.0},
    "dkd": {"losses.it.loss": "dkd"},
}


def varied(
    space: dict[str, Any], variants: dict[str, Any] = VARIANTS, *, seeds: int = 1, **search: Any
) -> Any:
    content = {"base": deepcopy(TOY), "variants": variants, "space": space, "search": search}
    content["seeds"] = seeds
    return validated(SweepConfig, content, where="sweep")


def test_every_variant_meets_every_point_and_all_weights_of_zero_are_one_control() -> None:
    sweep = varied({"losses.it.weight": {"grid": [0, 1]}, "seed": {"grid": [0, 1]}})
    points = points_of(sweep)
    # of two weights and two seeds: the control, which the weight of 1 undoes, and the others at 0
    labels = [(point["variant"], point["losses.it.weight"]) for point in points]
    assert sorted(set(labels)) == [("control", 0), ("control", 1), ("dkd", 1), ("hot", 1)]
    assert len(points) == 8


def test_a_variant_is_all_of_its_changes_and_a_point_has_the_last_word() -> None:
    run = varied({}).run({"variant": "hot", "epochs": 5})
    assert run.losses["it"].params["temperature"] == 8.0
    assert run.epochs == 5
    assert varied({}).run({}).losses["it"].params["temperature"] == 2.0


@pytest.mark.parametrize("algorithm", ["grid", "random"])
def test_every_variant_is_among_the_neighbours(algorithm: str) -> None:
    sweep = varied({"seed": {"grid": [0, 1, 2]}}, algorithm=algorithm)
    near = neighbours(sweep)
    assert {sweep.run({"variant": name}).identity for name in VARIANTS} <= {
        run.identity for run in near
    }
    assert len(near) <= 1 + len(VARIANTS)


@pytest.mark.parametrize(
    ("variants", "space", "words"),
    [
        ({"a": {"epochs": 0}}, {}, "variants.a is no run: toy: epochs: input should be greater"),
        ({"a": {"losses.x.loss": "kdd"}}, {}, "variants.a is no run: toy: losses.x"),
        ({"a, b": {}}, {}, "variants: a name has letters, digits and ' _-:/', not 'a, b'"),
        (
            {"a": {"workers": 1}},
            {},
            "variants.a.workers: name, runs, caches, workers, min_workers, allow_custom_losses",
        ),
        (
            {"a": {}, "b": {"losses.it.loss": "dist"}},
            {"losses.it.params.alpha": {"grid": [1]}},
            "space.losses.it.params.alpha: value 1 is no run of variant a: toy: losses.it",
        ),
    ],
)
def test_a_variant_that_is_no_run_is_refused(
    variants: dict[str, Any], space: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        varied(space, variants)


def test_a_variant_may_have_ranges_of_its_own() -> None:
    variants = {
        "plain": {"losses.it.weight": 0},
        "kd": {"losses.it.params.temperature": {"grid": [2.0, 8.0]}},
        "dkd": {"losses.it.loss": "dkd", "losses.it.params.beta": {"grid": [1.0, 4.0, 8.0]}},
    }
    sweep = varied({}, variants, seeds=2)
    found = points_of(sweep)
    assert len(found) == 2 * (1 + 2 + 3)
    betas = {run.losses["it"].params.get("beta") for run in map(sweep.run, found)}
    assert betas == {None, 1.0, 4.0, 8.0}
    assert {p["losses.it.params.beta"] for p in found if p["variant"] == "dkd"} == {1.0, 4.0, 8.0}
    assert "losses.it.params.beta" not in next(p for p in found if p["variant"] == "kd")


def test_a_range_of_a_variant_is_checked_too() -> None:
    variants = {"kd": {"losses.it.params.temperature": {"grid": [2.0, "hot"]}}}
    words = "variants.kd.losses.it.params.temperature: value 'hot' is no run of variant kd"
    with pytest.raises(ValueError, match=re.escape(words)):
        varied({}, variants)


# --- seeds and random searches ----------------------------------------------------------------


def test_seeds_are_counted_from_the_base_s_and_stand_together() -> None:
    content = {"base": {**deepcopy(TOY), "seed": 5}, "seeds": 3}
    content["space"] = {"epochs": {"grid": [1, 2]}}
    found = points_of(validated(SweepConfig, content, where="sweep"))
    assert [(point["epochs"], point["seed"]) for point in found] == [
        (epochs, seed) for epochs in (1, 2) for seed in (5, 6, 7)
    ]


def test_seeds_are_given_once() -> None:
    with pytest.raises(ValueError, match=r"space\.seed: is what `seeds` counts"):
        varied({"seed": {"grid": [0, 1]}}, {}, seeds=2)


RANDOM: dict[str, Any] = {
    "optimizer.lr": {"loguniform": [0.001, 1.0]},
    "losses.it.weight": {"normal": [1.0, 0.1]},
    "losses.it.params.temperature": {"quniform": [1.0, 8.0, 0.5]},
    "batch_size": {"choice": [16, 32]},
    "epochs": {"randint": [1, 4]},
}


def test_a_random_search_is_the_same_again_and_each_number_has_its_own_stream() -> None:
    search = {"algorithm": "random", "num_samples": 20, "seed": 3}
    drawn = points_of(varied(RANDOM, {}, **search))
    assert drawn == points_of(varied(RANDOM, {}, **search))
    less = points_of(varied({"optimizer.lr": RANDOM["optimizer.lr"]}, {}, **search))
    assert [p["optimizer.lr"] for p in less] == [p["optimizer.lr"] for p in drawn]
    assert drawn != points_of(varied(RANDOM, {}, **{**search, "seed": 4}))
    assert len({point["optimizer.lr"] for point in drawn}) == 20
    for point in drawn:
        assert 0.001 <= point["optimizer.lr"] <= 1
        assert 0.7 <= point["losses.it.weight"] <= 1.3
        assert point["losses.it.params.temperature"] % 0.5 == 0
        assert point["batch_size"] in (16, 32)
        assert point["epochs"] in (1, 2, 3)


def test_every_random_configuration_has_all_seeds_and_every_point_of_a_grid() -> None:
    space = {"optimizer.lr": RANDOM["optimizer.lr"], "losses.it.weight": {"grid": [1, 2]}}
    found = points_of(varied(space, {}, seeds=2, algorithm="random", num_samples=3))
    assert len(found) == 3 * 2 * 2
    assert len({point["optimizer.lr"] for point in found}) == 3


def test_a_random_search_draws_the_variant_and_only_its_ranges() -> None:
    beta = {"losses.it.params.beta": {"uniform": [1.0, 8.0]}}
    variants = {"kd": {}, "dkd": {"losses.it.loss": "dkd", **beta}}
    found = points_of(varied({}, variants, algorithm="random", num_samples=30))
    drawn = [point for point in found if point["variant"] == "dkd"]
    assert 5 < len(drawn) < 25
    assert all("losses.it.params.beta" in point for point in drawn)
    assert [p for p in found if p["variant"] == "kd"] == [{"variant": "kd"}]  # one run, drawn often


@pytest.mark.parametrize(
    ("values", "probes"),
    [
        ({"quniform": [0.1, 0.9, 0.25]}, [0.25, 0.75]),
        ({"quniform": [0.0, 1.0, 0.1]}, [0.0, 1.0]),
        ({"normal": [1.0, 0.5]}, [-0.5, 1.0, 2.5]),
        ({"randint": [1, 5]}, [1, 4]),
        ({"uniform": [0.0, math.pi]}, [0.0, 1.0, math.pi]),
    ],
)
def test_a_range_is_probed_at_its_ends(values: dict[str, Any], probes: list[float]) -> None:
    assert Range.model_validate(values).probes == pytest.approx(probes)


def test_a_quniform_without_a_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no multiple of 1 in \[0\.2, 0\.8\]"):
        Range.model_validate({"quniform": [0.2, 0.8, 1.0]})
