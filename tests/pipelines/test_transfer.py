from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from kdcore.datafree.augmentation import Augmentation
from kdcore.datafree.presets import PRESETS
from kdcore.models import convnet
from pipelines import jobs
from pipelines.config import RunConfig
from pipelines.loading import load, load_transfer
from pipelines.strict import validated
from pipelines.synthesize import teacher_of
from pipelines.tracking import Tracker
from pipelines.transfer import TransferConfig
from pipelines.transfer_sets import MANIFEST

CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"


def content(folder: Path) -> dict[str, Any]:
    path = folder / "teacher.safetensors"
    save_file(convnet(10, 1, width=4).state_dict(), path)
    return {
        "teacher": {"name": "convnet", "params": {"width": 4}, "weights": str(path)},
        "method": "deepinversion",
        "shape": [1, 8, 8],
        "num_classes": 10,
        "count": 12,
    }


def config(folder: Path, **changes: Any) -> TransferConfig:
    return changed(content(folder), **changes)


def changed(content: dict[str, Any], **changes: Any) -> TransferConfig:
    return validated(TransferConfig, {**content, **changes}, where="here")


def test_a_change_reaches_every_kind_of_value(tmp_path: Path) -> None:
    change = {
        "images": {"lr": 0.2, "betas": [0.5, 0.9]},
        "schedule": {"steps": 3},
        "priors": {"statistics": {"weight": 1}, "entropy": {"params": {}}},
        "view": {"flip": True},
    }
    plan = config(tmp_path, change=change).plan
    assert plan.images.lr == 0.2
    assert plan.images.betas == (0.5, 0.9)
    assert plan.schedule.steps == 3
    assert plan.schedule.batch_size == PRESETS["deepinversion"].schedule.batch_size
    assert plan.priors["statistics"].weight == 1.0
    assert plan.priors["entropy"].weight == 1.0
    assert plan.priors["class"] == PRESETS["deepinversion"].priors["class"]
    assert plan.view.flip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "deepinversin"}, "unknown method 'deepinversin'; did you mean 'deepinversion'"),
        ({"method": "dafl"}, "while its student learns, so it has no transfer set: name it as"),
        ({"change": {"images": {"lrs": 1}}}, "unknown key change.images 'lrs'; did you mean 'lr'"),
        ({"change": {"images": 3}}, "change.images: expected a mapping of keys, got 3"),
        ({"change": {"images": {"lr": "x"}}}, "change.images.lr: input should be a valid number"),
        ({"change": {"keep": "first"}}, "change.keep: input should be 'best' or 'last'"),
        ({"change": {"priors": {"tv": {}}}}, "unknown prior 'tv'"),
        (
            {"change": {"priors": {"statistics": {"params": {"factor": 2}}}}},
            "change.priors.statistics.params: unknown key 'factor'; did you mean 'first_factor'",
        ),
        (
            {"change": {"priors": {"activation": {"params": {"reduction": "summ"}}}}},
            "change.priors.activation.params.reduction: input should be 'mean' or 'sum'",
        ),
        (
            {"change": {"priors": {"soft_class": {"params": {"temperature": 0}}}}},
            "change.priors.soft_class.params.temperature: input should be greater than 0",
        ),
        (
            {"change": {"priors": {"class": {"weight": -1}}}},
            "change.priors.class.weight: input should be greater than or equal to 0",
        ),
        (
            {"change": {"schedule": {"batch_size": 0}}},
            "change.schedule.batch_size: input should be greater than 0",
        ),
        (
            {"change": {"schedule": {"steps": -3}}},
            "change.schedule.steps: input should be greater than or equal to 0",
        ),
        (
            {"change": {"schedule": {"steps": {"first": 3}}}},
            "change.schedule.steps: input should be a valid integer",
        ),
        ({"method": "lopes"}, "method 'lopes' needs `records`"),
        ({"records": {"name": "digits"}}, "method 'deepinversion' has no use for `records`"),
        ({"shape": [2, 8, 8]}, "shape: expected 1 or 3 channels before height and width, got (2, "),
        (
            {"shape": [3, 8, 8], "mean": [0.5, 0.4]},
            "mean: expected one number or as many as channels, 3, got (0.5, 0.4)",
        ),
        ({"std": [0.2, 0.2, 0.2]}, "std: expected one number or as many as channels, 1, got ("),
        ({"change": {"losses": {}}}, "change.losses: what a student learns by are the `losses` of"),
        ({"change": {"student_view": {}}}, "change.student_view: how a student sees the pictures"),
        ({"change": {"pool_limit": 8}}, "change.pool_limit: a transfer set is made before any"),
        ({"change": {"student_mode": "train"}}, "change.student_mode: a transfer set is made"),
        ({"metod": "zskd"}, "unknown key 'metod'; did you mean 'method'"),
    ],
)
def test_a_mistake_is_named_with_its_place(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **changes)


def test_the_identity_is_of_what_decides_the_pictures(tmp_path: Path) -> None:
    held = content(tmp_path)
    first = changed(held).identity
    same = {"name": "other", "actors": 3, "samples_every": 1, "transfer_sets": "elsewhere"}
    assert changed(held, **same).identity == first
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"shard_size": 5},
        {"change": {"schedule": {"steps": 7}}},
        {"method": "zskd"},
        {"std": [0.5]},
    ]
    identities = {changed(held, **other).identity for other in others}
    assert len(identities | {first}) == 6
    held = content(tmp_path)  # other weights under the same name
    assert changed(held).identity != first


def test_the_identity_knows_nothing_of_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = content(tmp_path)
    first = changed(held).identity
    method = PRESETS["deepinversion"]
    of_the_student: dict[str, Any] = {
        "losses": {},
        "student_view": Augmentation(flip=True),
        "student_mode": "train",
        "pool_limit": 8,
    }
    for key, value in of_the_student.items():
        other = {**PRESETS, "deepinversion": replace(method, **{key: value})}
        monkeypatch.setattr("pipelines.methods.PRESETS", other)
        assert changed(held).identity == first, key


def test_records_are_identified_as_the_data_of_a_run_are(tmp_path: Path) -> None:
    held = {**content(tmp_path), "method": "lopes", "records": {"name": "digits"}}
    first = changed(held).identity
    for same in ({"test": {"name": "mnist"}}, {"spool": "elsewhere"}, {"download": True}):
        assert changed(held, records={"name": "digits", **same}).identity == first, same
    assert changed(held, records={"name": "digits", "limit": 500}).identity != first


def test_the_transfer_sets_that_ship_are_checked() -> None:
    for path in sorted((CONFIGS / "transfer_sets").glob("*.yaml")):
        assert load_transfer(path).plan.schedule.steps > 0


def test_a_teacher_that_is_a_run_has_its_size_and_normalisation(
    toy_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "set.yaml"
    teacher = toy_run.with_name("toy_teacher.yaml")
    file.write_text(
        f"teacher: {{run: {teacher}}}\nmethod: noise\nshape: [1, 8, 8]\nnum_classes: 10\ncount: 4\n"
    )
    loaded = load_transfer(file, ["change.schedule.batch_size=2"])
    assert loaded.name == "set"
    assert loaded.plan.schedule.batch_size == 2
    with pytest.raises(ValueError, match=r"mean and std are \(0.1,\) and \(0.25,\), and the"):
        load_transfer(file, ["mean=[0.1]"])
    sized = "teacher.run.data.size=16"
    with pytest.raises(ValueError, match=r"data.size 16; expected \(1, 16, 16\)"):
        load_transfer(file, [sized])
    assert load_transfer(file, [sized, "shape=[1, 16, 16]"]).shape == (1, 16, 16)


def student_of(root: Path, *, size: int | None, data: dict[str, Any]) -> RunConfig:
    """A run on a folder of Parquet, whose teacher's run has digits of 16 x 16 pixels."""
    net = {"student": {"name": "convnet"}, "epochs": 1}
    theirs = {**net, "data": {"name": "digits", "size": size, "validation": 0.2}}
    own = {"name": "parquet", "root": str(root), **data}
    content = {**net, "data": own, "losses": {"kd": {}}}
    teacher = {"run": {**theirs, "losses": {"ce": {}}}}
    return validated(RunConfig, {**content, "teacher": teacher}, where="here")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder of a set of which there is only the manifest."""
    held = {"teacher_digest": "0" * 64, "num_classes": 10, "shape": [1, 16, 16]}
    (tmp_path / MANIFEST).write_text(json.dumps(held))
    return tmp_path


@pytest.mark.parametrize("data", [{}, {"size": 16}, {"limit": 8, "split_seed": 3}])
@pytest.mark.parametrize("size", [None, 16])
def test_invented_pictures_are_nobody_s_validation_pictures(
    data: dict[str, Any], size: int | None, made: Path
) -> None:
    assert student_of(made, size=size, data=data).data.root == made


@pytest.mark.parametrize(
    ("size", "data", "message"),
    [
        (8, {}, "data.size is 16 and the teacher's run has 8; they must be the same"),
        (None, {"size": 8}, "data.size is 8 and the teacher's run has 16; they must be the same"),
        (16, {"mean": [0.1]}, "data.mean is (0.1,) and the teacher's run has (0.5,)"),
        (16, {"std": [0.1]}, "data.std is (0.1,) and the teacher's run has (0.25,)"),
    ],
)
def test_invented_pictures_are_as_large_and_normalised_as_their_teacher_s(
    size: int | None, data: dict[str, Any], message: str, made: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        student_of(made, size=size, data=data)


def test_the_student_that_ships_fits_the_set_that_ships(tmp_path: Path) -> None:
    made = load_transfer(CONFIGS / "transfer_sets" / "digits.yaml")
    held = {"teacher_digest": "0" * 64, **made.model_dump(include={"num_classes", "shape"})}
    (tmp_path / MANIFEST).write_text(json.dumps(held))
    run = load(CONFIGS / "runs" / "digits_transfer.yaml", [f"data.root={tmp_path}"])
    assert isinstance(run, RunConfig)
    (teacher,) = run.teachers.values()
    assert teacher.run == made.teacher.run


def test_a_folder_that_is_not_made_yet_waits_for_its_pictures(tmp_path: Path) -> None:
    assert student_of(tmp_path / "later", size=16, data={}).data.size is None
    with pytest.raises(ValueError, match=r"data.name is .parquet. and the teacher.s run has"):
        student_of(tmp_path, size=16, data={})  # there, and no transfer set


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"^method 'deepinversion': the priors \['statistics'\] .* has no such layer; .*zskd"),
        (
            {"change": {"priors": {"activation": {"layer": "layer9"}}}},
            "^teacher: unknown layer of VisionTransformer 'layer9'",
        ),
    ],
    ids=["no BatchNorm", "no such layer"],
)
def test_a_teacher_that_the_method_cannot_use_is_refused_before_it_is_trained(
    tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "teacher_weights", lambda *_, **__: pytest.fail("it was trained"))
    net = {"name": "timm/test_vit", "params": {"img_size": 8, "patch_size": 4}}
    run = {"student": net, "data": {"name": "digits"}, "epochs": 1, "losses": {"ce": {}}}
    asked = config(tmp_path, teacher={"run": run}, transfer_sets=str(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        jobs.synthesize(asked, watch=lambda *_: None, tracker=Tracker())


def test_a_prior_without_weight_looks_at_no_layer(tmp_path: Path) -> None:
    off = {"record": {"weight": 0, "layer": "layer9"}}
    asked = config(tmp_path, change={"priors": off})
    assert asked.teacher.weights is not None
    assert teacher_of(asked, asked.teacher.weights).layers == ()
