"""A run: values checked, defaults filled in, mistakes explained, an identity that is exact."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines
from kdcore.losses import LOSSES
from pipelines.augment import VERSION, AugmentConfig
from pipelines.config import RunConfig
from pipelines.digests import digest, plain
from pipelines.loading import load
from pipelines.space import SweepConfig, changed
from pipelines.strict import validated

CONFIGS = Path(pipelines.__file__).parent / "configs"
SHIPPED = sorted([*CONFIGS.glob("runs/*.yaml"), *CONFIGS.glob("sweeps/*.yaml")])

TOY: dict[str, Any] = {
    "student": {"name": "convnet", "params": {"width": 2}},
    "data": {"name": "digits"},
    "epochs": 2,
    "losses": {"ce": {}},
}
TEACHER: dict[str, Any] = {"teacher": {"name": "resnet8", "weights": "teacher.safetensors"}}
KD: dict[str, Any] = {**TEACHER, "losses": {"kd": {}}}
BIG = {"label": "big", "name": "resnet56", "weights": "big.safetensors"}
SMALL = {"label": "small", "name": "resnet8", "weights": "small.safetensors"}
TWO: dict[str, Any] = {"teacher": [BIG, SMALL]}
MID: dict[str, Any] = {"loss": "mse", "layers": {"block1": "layer1"}}


def run_of(**changes: Any) -> RunConfig:
    return validated(RunConfig, {**deepcopy(TOY), **changes}, where="toy.yaml")


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


# --- defaults ---------------------------------------------------------------------------------


def test_the_label_names_the_loss_unless_it_is_named() -> None:
    run = run_of(**TEACHER, losses={"kd": {}, "soft": {"loss": "kd"}, "ce": {}})
    assert {label: term.loss for label, term in run.losses.items()} == {
        "kd": "kd",
        "soft": "kd",
        "ce": "ce",
    }


def line(key: str) -> dict[str, Any]:
    """The least that a run must say of a loss: its name, and layers where it has no default."""
    needed = LOSSES[key].takes_layers and not LOSSES[key].default_layers
    return {"loss": key, "layers": {"block2": "layer2"}} if needed else {"loss": key}


@pytest.mark.parametrize("key", LOSSES)
def test_every_parameter_of_a_loss_is_filled_in_from_its_signature(key: str) -> None:
    loss, named = LOSSES[key], line(key)
    (term,) = run_of(**TEACHER, losses={"it": named}).losses.values()
    assert term.params == {name: held.default for name, held in loss.hyperparameters.items()}
    assert term.layers == (named.get("layers") or loss.default_layers)
    assert term.weight == LOSSES[key].weight


def test_a_given_parameter_is_kept_as_the_type_of_the_signature() -> None:
    run = run_of(**TEACHER, losses={"kd": {"params": {"temperature": 2}}})
    assert repr(run.losses["kd"].params) == "{'temperature': 2.0}"


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    # YAML 1.1 takes 5e-4, without a dot, for a string
    content = yaml.safe_load("{lr: 5e-4, weight_decay: 0}")
    assert run_of(optimizer=content).optimizer.lr == 5e-4


def test_the_layers_are_those_of_the_losses_that_have_a_weight() -> None:
    terms = {
        "first": {"loss": "mse", "layers": {"block1": "layer1"}},
        "second": {"loss": "w2", "layers": {"block1": "layer2", "embedding": "embedding"}},
        "off": {"loss": "mse", "weight": 0, "layers": {"block3": "layer3"}},
    }
    run = run_of(**TEACHER, losses=terms)
    assert run.teacher_layers == {"resnet8": ("embedding", "layer1", "layer2")}
    assert run.student_layers == ("block1", "embedding")
    assert list(run.active) == ["first", "second"]


def test_each_teacher_has_the_layers_of_the_terms_that_name_it() -> None:
    terms = {"kd": {}, "mid": {**MID, "teacher": "big"}, "near": {"loss": "w2", "teacher": "small"}}
    run = run_of(**TWO, losses=terms)
    assert run.teacher_layers == {"big": ("embedding", "layer1"), "small": ("embedding",)}


@pytest.mark.parametrize(
    ("losses", "bounds", "heard"),
    [
        ({"kd": {}}, {}, ["big", "small"]),
        ({"kd": {"teacher": "small"}}, {}, ["small"]),
        ({"kd": {"teacher": "small"}, "mid": {**MID, "teacher": "big"}}, {}, ["big", "small"]),
        ({"ce": {}, "kd": {"weight": 0}}, {}, []),
        ({"ce": {}}, {"bounds": True, "teacher": "big"}, ["big"]),
        ({"ce": {}}, {"teacher": "big"}, []),
    ],
)
def test_those_are_heard_to_whom_a_term_or_a_diagnostic_listens(
    losses: dict[str, Any], bounds: dict[str, Any], heard: list[str]
) -> None:
    run = run_of(**TWO, losses=losses, diagnostics=bounds)
    assert list(run.heard) == heard
    assert list(run.teacher_layers) == heard


def test_a_teacher_is_called_by_its_label_its_network_or_its_run() -> None:
    unnamed = [{**BIG, "label": None}, {"run": {**TOY, "name": "earlier"}}, SMALL]
    assert list(run_of(teacher=unnamed).teachers) == ["resnet56", "earlier", "small"]


def test_cross_entropy_is_active_at_any_weight() -> None:
    run = run_of(**TEACHER, losses={"ce": {"weight": 0}, "kd": {}})
    assert list(run.active) == ["ce", "kd"]


def test_a_run_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one with a weight above 0"):
        run_of(losses={"ce": {"weight": 0}})


def test_augmentation_without_views_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data: augment changes views, and there are none"):
        run_of(data={"name": "digits", "augment": {"flip": True}})


@pytest.mark.parametrize("key", ["split_seed", "mean", "size"])
def test_a_teacher_that_saw_other_pictures_is_refused(key: str) -> None:
    other = {"split_seed": 4, "mean": [0.1], "size": 16}[key]
    theirs = {**TOY, "data": {**TOY["data"], key: other}}
    with pytest.raises(ValueError, match=rf"data\.{key} is .*\(teacher\.run\.data\.{key}\)"):
        run_of(teacher={"run": theirs})


def test_a_teacher_by_run_is_that_run_s_student() -> None:
    run = run_of(teacher={"run": TOY})
    assert run.teacher is not None
    assert run.teacher.network == run.student


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_configuration_that_is_shipped_loads(path: Path) -> None:
    assert load(path).name == path.stem


# --- mistakes ---------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Mapping[str, Any], str]] = {
    "unknown key": ({"epoch": 3}, "toy.yaml: unknown key 'epoch'; did you mean 'epochs'?"),
    "unknown key of student": (
        {"student": {"name": "convnet", "weight": "x.pth"}},
        "toy.yaml: student: unknown key 'weight'; did you mean 'weights'?",
    ),
    "unknown key of teacher": (
        {"teacher": {"name": "resnet8", "wieghts": "x.pth"}},
        "toy.yaml: teacher: unknown key 'wieghts'; did you mean 'weights'?",
    ),
    "unknown key of data": (
        {"data": {"name": "digits", "vews": 3}},
        "toy.yaml: data: unknown key 'vews'; did you mean 'views'?",
    ),
    "unknown key of augment": (
        {"data": {"name": "digits", "augment": {"flips": True}}},
        "toy.yaml: data.augment: unknown key 'flips'; did you mean 'flip'?",
    ),
    "two ways to crop": (
        {"data": {"name": "digits", "views": 1, "augment": {"crop": 4, "resized_crop": {}}}},
        "toy.yaml: data.augment: `crop` and `resized_crop` are two ways to crop; leave one out",
    ),
    "a range upside down": (
        {"data": {"name": "digits", "views": 1, "augment": {"erase": {"ratio": [3, 1]}}}},
        "toy.yaml: data.augment.erase.ratio: expected the lower end first, got [3.0, 1.0]",
    ),
    "more than the picture": (
        {"data": {"name": "digits", "views": 1, "augment": {"erase": {"area": [0.1, 1.5]}}}},
        "toy.yaml: data.augment.erase.area: expected shares of the picture, at most 1, got "
        "[0.1, 1.5]",
    ),
    "unknown key of optimizer": (
        {"optimizer": {"learning_rate": 0.1}},
        "toy.yaml: optimizer: unknown key 'learning_rate'; known: lr, momentum, multipliers, "
        "name, nesterov, schedule, weight_decay",
    ),
    "unknown key of schedule": (
        {"optimizer": {"schedule": {"name": "steps", "epoch": [1]}}},
        "unknown key 'epoch'; did you mean 'epochs'?",
    ),
    "unknown key of a loss": (
        {"losses": {"ce": {"wieght": 1}}},
        "toy.yaml: losses.ce: unknown key 'wieght'; did you mean 'weight'?",
    ),
    "unknown key of the teacher's run": (
        {"teacher": {"run": {**TOY, "epoch": 3}}},
        "toy.yaml: teacher.run: unknown key 'epoch'; did you mean 'epochs'?",
    ),
    "unknown loss": (
        {"losses": {"kdd": {}}},
        "toy.yaml: losses.kdd: unknown loss 'kdd'; did you mean 'kd'?",
    ),
    "unknown loss under a label": (
        {"losses": {"soft": {"loss": "w3"}}},
        "toy.yaml: losses.soft: unknown loss 'w3'; did you mean 'w2'?",
    ),
    "typo in the parameters of a loss": (
        {**TEACHER, "losses": {"kd": {"params": {"temprature": 3}}}},
        "toy.yaml: losses.kd: params: unknown key 'temprature'; did you mean 'temperature'?",
    ),
    "wrong type in the parameters of a loss": (
        {**TEACHER, "losses": {"kd": {"params": {"temperature": "hot"}}}},
        "toy.yaml: losses.kd: params.temperature: input should be a valid number",
    ),
    "wrong choice in the parameters of a loss": (
        {**TEACHER, "losses": {"w2": {"params": {"normalise": "std"}}}},
        "toy.yaml: losses.w2: params.normalise: input should be 'none' or 'variance', got 'std'",
    ),
    "parameters that are no mapping": (
        {**TEACHER, "losses": {"kd": {"params": [4]}}},
        "toy.yaml: losses.kd: params: input should be a valid dictionary",
    ),
    "wrong type": (
        {"epochs": "many"},
        "toy.yaml: epochs: input should be a valid integer, unable to parse string as an integer, "
        "got 'many'",
    ),
    "wrong value": (
        {"data": {"name": "digits", "validation": 1}},
        "toy.yaml: data.validation: input should be less than 1, got 1",
    ),
    "wrong choice": (
        {"precision": "fp8"},
        "toy.yaml: precision: input should be 'fp32', 'bf16' or 'fp16', got 'fp8'",
    ),
    "wrong schedule": (
        {"optimizer": {"schedule": {"name": "step"}}},
        "toy.yaml: optimizer.schedule: input tag 'step' found using 'name' does not match any of "
        "the expected tags: 'cosine', 'steps'",
    ),
    "a student that is a string": (
        {"student": "convnet"},
        "toy.yaml: student: input should be a valid dictionary or instance of StudentConfig, got "
        "'convnet'",
    ),
    "unknown network": (
        {"student": {"name": "resnet21"}},
        "toy.yaml: student.name: unknown network 'resnet21'; did you mean 'resnet32'?; others are "
        "timm/<name>, torchvision/<name>",
    ),
    "unknown network of a teacher": (
        {"teacher": {"name": "covnet", "weights": "x.pth"}},
        "unknown network 'covnet'; did you mean 'convnet'?",
    ),
    "unknown library": (
        {"student": {"name": "keras/resnet18"}},
        "toy.yaml: student.name: expected timm/<name> or torchvision/<name>, got 'keras/resnet18'",
    ),
    "layers of a loss on logits": (
        {**TEACHER, "losses": {"kd": {"layers": {"block1": "layer1"}}}},
        "toy.yaml: losses.kd: loss 'kd' compares logits and takes no `layers`",
    ),
    "batch_size that does not divide": (
        {"batch_size": 10, "workers": 3},
        "toy.yaml: batch_size 10 must be a multiple of workers 3",
    ),
    "batch_size that some of its workers cannot share": (
        {"batch_size": 64, "workers": 4, "min_workers": 2},
        "toy.yaml: batch_size 64 must be a multiple of workers 3: every worker gets as many rows "
        "as every other; take a multiple of 12",
    ),
    "fewest workers that are more than all": (
        {"workers": 2, "min_workers": 4},
        "toy.yaml: min_workers 4 is more than workers 2",
    ),
    "loss without the teacher it needs": (
        {"losses": {"ce": {}, "soft": {"loss": "kd"}}},
        "toy.yaml: losses.soft needs a teacher and the run has none",
    ),
    "teacher of two origins": (
        {"teacher": {**TEACHER["teacher"], "run": TOY}},
        "toy.yaml: teacher: a teacher is either `name: NETWORK` with `weights: FILE`, or `run: "
        "RUN.yaml`",
    ),
    "teacher of a run with other weights": (
        {"teacher": {"weights": "x.pth", "run": TOY}},
        "toy.yaml: teacher: a teacher is either `name: NETWORK` with `weights: FILE`, or `run: "
        "RUN.yaml`",
    ),
    "teacher of a run with another name": (
        {"teacher": {"name": "resnet8", "run": TOY}},
        "toy.yaml: teacher: a teacher is either `name: NETWORK` with `weights: FILE`, or `run: "
        "RUN.yaml`",
    ),
    "teacher of no origin": (
        {"teacher": {}},
        "toy.yaml: teacher: a teacher is either `name: NETWORK` with `weights: FILE`, or `run: "
        "RUN.yaml`",
    ),
    "teacher without weights": (
        {"teacher": {"name": "resnet8"}},
        "toy.yaml: teacher: a teacher is either `name: NETWORK` with `weights: FILE`, or `run: "
        "RUN.yaml`",
    ),
    "no teachers": ({"teacher": []}, "toy.yaml: teacher: tuple should have at least 1 item"),
    "two teachers of one name": (
        {"teacher": [{**BIG, "label": None}, {**BIG, "label": None, "weights": "b.pth"}]},
        "toy.yaml: teacher: 'resnet56' is the name of two; give each a `label`",
    ),
    "unknown key of the second teacher": (
        {"teacher": [BIG, {**SMALL, "wieghts": "x.pth"}]},
        "toy.yaml: teacher.1: unknown key 'wieghts'; did you mean 'weights'?",
    ),
    "a second teacher that saw other pictures": (
        {"teacher": [BIG, {"label": "b", "run": {**TOY, "data": {**TOY["data"], "size": 16}}}]},
        "toy.yaml: data.size is None and the teacher b's run has 16; they must be the same",
    ),
    "unknown teacher of a loss": (
        {**TWO, "losses": {"kd": {"teacher": "smal"}}},
        "toy.yaml: losses.kd.teacher: unknown teacher 'smal'; did you mean 'small'?",
    ),
    "unknown teacher of a run with one": (
        {**TEACHER, "losses": {"kd": {"teacher": "resnet9"}}},
        "toy.yaml: losses.kd.teacher: unknown teacher 'resnet9'; did you mean 'resnet8'?",
    ),
    "unknown teacher of a loss that is off": (
        {**TWO, "losses": {"ce": {}, "kd": {"weight": 0, "teacher": "smal"}}},
        "toy.yaml: losses.kd.teacher: unknown teacher 'smal'",
    ),
    "unknown teacher of the diagnostics": (
        {**TWO, "diagnostics": {"teacher": "bgi"}},
        "toy.yaml: diagnostics.teacher: unknown teacher 'bgi'; did you mean 'big'?",
    ),
    "features of an average": (
        {**TWO, "losses": {"kd": {}, "mid": MID}},
        "toy.yaml: losses.mid needs a teacher's layers or classifier, and the average of several "
        "has neither: say whose by `teacher`, one of big, small",
    ),
    "classifier of an average": (
        {**TWO, "losses": {"wkd_l": {}}},
        "toy.yaml: losses.wkd_l needs a teacher's layers or classifier, and the average of several "
        "has neither: say whose by `teacher`, one of big, small",
    ),
    "bounds of an average": (
        {**TWO, "diagnostics": {"bounds": True}},
        "toy.yaml: diagnostics.bounds needs a teacher's layers or classifier, and the average of "
        "several has neither: say whose by `teacher`, one of big, small",
    ),
    "bounds without a teacher": (
        {"diagnostics": {"bounds": True}},
        "toy.yaml: diagnostics.bounds needs a teacher and the run has none",
    ),
    "teacher of a loss that hears none": (
        {**TWO, "losses": {"ce": {"teacher": "big"}}},
        "toy.yaml: losses.ce: loss 'ce' listens to no teacher and takes no `teacher`",
    ),
    "average in no space": (
        {**TWO, "ensemble": "features"},
        "toy.yaml: ensemble: input should be 'probabilities' or 'logits', got 'features'",
    ),
    "no losses": ({"losses": {}}, "losses: expected at least one, such as `ce: {weight: 1}`"),
    "losses that are a list": (
        {"losses": ["ce"]},
        "toy.yaml: losses: input should be a valid dictionary, got ['ce']",
    ),
    "label that is no word": (
        {"losses": {"a-b": {"loss": "ce"}}},
        "toy.yaml: losses: a loss label is a word such as kd or mid_layer and no metric's name "
        "(loss, top1), got 'a-b'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_error_with_place_found_and_expected(mistake: str) -> None:
    change, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run_of(**change)
    assert type(error.value) is ValueError  # pydantic's own is a ValueError too, and unreadable


def test_missing_keys_are_named_all_at_once() -> None:
    with pytest.raises(ValueError, match=r"toy\.yaml: student is missing; data\.name is missing"):
        validated(RunConfig, {"data": {}, "epochs": 1, "losses": {"ce": {}}}, where="toy.yaml")


def test_two_mistakes_are_both_named() -> None:
    with pytest.raises(ValueError, match=r"epochs: .*, got 0; batch_size: .*, got 'x'"):
        run_of(epochs=0, batch_size="x")


# --- files and --set --------------------------------------------------------------------------


def test_a_file_gives_its_name_to_the_run(tmp_path: Path) -> None:
    assert load(write(tmp_path / "small.yaml", TOY)).name == "small"
    assert load(write(tmp_path / "other.yaml", {**TOY, "name": "given"})).name == "given"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1\nb: {", r"broken\.yaml is not YAML: while parsing a flow sequence"),
        ("- 1\n- 2", r"broken\.yaml: expected a mapping of keys, got list"),
        ("", r"broken\.yaml: expected a mapping of keys, got NoneType"),
        ("epoch: 1", r"broken\.yaml: unknown key 'epoch'; did you mean 'epochs'\?"),
        ("base: none.yaml\nspace: {}", r"no configuration at .*none\.yaml"),
        ("teacher: {run: none.yaml}", r"no configuration at .*none\.yaml"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert type(error.value) is ValueError


def test_a_file_that_is_not_text_or_not_there_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"weights\.yaml is not YAML"):
        load(tmp_path / "weights.yaml")
    with pytest.raises(ValueError, match=r"no configuration at .*none\.yaml"):
        load(tmp_path / "none.yaml")


def test_a_set_value_is_yaml_at_a_dotted_path(tmp_path: Path) -> None:
    path = write(tmp_path / "toy.yaml", TOY)
    run = load(path, ["optimizer.lr=5e-4", "losses.ce={weight: 2}", "data.mean=[0.1]", "name=a=b"])
    assert isinstance(run, RunConfig)
    assert run.optimizer.lr == 5e-4
    assert run.losses["ce"].weight == 2
    assert run.data.mean == (0.1,)
    assert run.name == "a=b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs", "--set expects dotted.path=value, got 'epochs'"),
        ("epochs.value=3", "cannot set epochs.value: epochs is 2, not a mapping"),
        ("losses.ce.weight.x.y=3", "cannot set losses.ce.weight.x.y: losses.ce.weight is 1, not"),
        ("data.vews=3", "data: unknown key 'vews'; did you mean 'views'?"),
        ("losses={", "losses={"),  # neither is this YAML
        ("losses.ce.loss=[ce, kd]", "losses.ce.loss"),
    ],
)
def test_a_wrong_set_is_refused(tmp_path: Path, change: str, message: str) -> None:
    path = write(tmp_path / "toy.yaml", {**TOY, "losses": {"ce": {"weight": 1}}})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(path, [change])
    assert type(error.value) is ValueError


def test_other_configurations_are_found_beside_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("runs", "teachers", "sweeps", "elsewhere"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "teachers" / "big.yaml", {**TOY, "epochs": 7})
    write(tmp_path / "runs" / "small.yaml", {**TOY, "teacher": {"run": "../teachers/big.yaml"}})
    write(tmp_path / "sweeps" / "all.yaml", {"base": "../runs/small.yaml", "space": {}})
    monkeypatch.chdir(tmp_path / "elsewhere")
    sweep = load(tmp_path / "sweeps" / "all.yaml")
    assert isinstance(sweep, SweepConfig)
    assert sweep.base == load(Path("../runs/small.yaml"))
    assert sweep.base.teacher is not None
    assert sweep.base.teacher.run is not None
    assert (sweep.base.teacher.run.name, sweep.base.teacher.run.epochs) == ("big", 7)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("epochs: 1\nlosses: {ce: {}, kd: {weight: 1}, kd: {weight: 2}}\n")
    with pytest.raises(ValueError, match=r"twice\.yaml is not YAML: key 'kd' is given twice"):
        load(path)


def test_the_teacher_s_run_may_be_set_to_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "toy.yaml", TOY)
    write(tmp_path / "other.yaml", {**TOY, "epochs": 7})
    run = load(path, ["teacher={run: other.yaml}"])
    assert isinstance(run, RunConfig)
    assert run.teacher is not None
    assert run.teacher.run is not None
    assert run.teacher.run.epochs == 7


def test_the_runs_of_several_teachers_are_found_beside_the_file(tmp_path: Path) -> None:
    write(tmp_path / "first.yaml", TOY)
    write(tmp_path / "second.yaml", {**TOY, "epochs": 7})
    teachers = [{"run": "first.yaml"}, {"run": "second.yaml"}, BIG]
    run = load(write(tmp_path / "toy.yaml", {**TOY, "teacher": teachers}), ["teacher.2.stem=small"])
    assert isinstance(run, RunConfig)
    runs = {label: teacher.run and teacher.run.epochs for label, teacher in run.teachers.items()}
    assert runs == {"first": 2, "second": 7, "big": None}
    assert run.teachers["big"].stem == "small"


def test_a_configuration_that_names_itself_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "loop.yaml", {**TOY, "teacher": {"run": "loop.yaml"}})
    with pytest.raises(ValueError, match=r"loop\.yaml"):
        load(path)


# --- identity ---------------------------------------------------------------------------------

# Every leaf of a run with another value; "leaf @ path" replaces a whole mapping, since its other
# keys do not go with the new value.
OTHER_DATA = {
    "data.name": "cifar10",
    "data.root": "elsewhere",
    "data.size": 16,
    "data.classes": 5,
    "data.classes_seed": 1,
    "data.on_bad_image": "skip",
    "data.limit": 100,
    "data.validation": 0.2,
    "data.split_seed": 1,
    "data.views": 3,
    "data.view_seed": 1,
    "data.augment.crop": 2,
    "data.augment.flip": True,
    "data.mean": [0.4],
    "data.std": [0.2],
}
OTHER_OPTIMIZER = {
    "optimizer.name": "adamw",
    "optimizer.lr": 0.01,
    "optimizer.momentum": 0.8,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 1e-4,
    "optimizer.schedule.name @ optimizer.schedule": {"name": "steps"},
    "optimizer.schedule.floor": 0.1,
}
OTHER = {
    "student.name": "resnet8",
    "student.weights": "student.pth",
    "student.params.width": 3,
    "student.stem": "small",
    **OTHER_DATA,
    "epochs": 3,
    "batch_size": 32,
    **OTHER_OPTIMIZER,
    "losses.ce.weight": 2,
    "losses.ce.params.label_smoothing": 0.1,
    "diagnostics.bounds": True,
    "diagnostics.rows": 7,
    "workers": 2,
    "min_workers": 1,
    "seed": 1,
    "precision": "bf16",
}
OTHER_TEACHER = {
    "teacher.name": "resnet14",
    "teacher.weights": "other.safetensors",
    "teacher.params.width": 9,
    "teacher.stem": "small",
    "teacher.run @ teacher": {"run": TOY},
    "teacher.source": "live",
    "teacher.precision": "bf16",
    "teacher.logits": "uint8",
    "losses.kd.loss": "ce",
    "losses.kd.weight": 2,
    "losses.kd.params.temperature": 2,
    "losses.mid.loss @ losses.mid": {"loss": "w2", "layers": {"block1": "layer1"}},
    "losses.mid.weight": 2,
    "losses.mid.layers.block1": "layer2",
}
NO_MATTER = {
    *("name", "runs", "caches", "save_every", "allow_custom_losses"),
    *("data.download", "data.spool", "data.test"),
}
# what tells several teachers apart says nothing of one
ONE_TEACHER = {
    "teacher.label": "other",
    "ensemble": "logits",
    "diagnostics.teacher": "resnet8",
    "losses.kd.teacher": "resnet8",
    "losses.mid.teacher": "resnet8",
}
SHARED = (
    *("name", "root", "size", "classes", "classes_seed", "on_bad_image", "limit"),
    *("validation", "split_seed", "mean", "std"),
)
# what is called ce is cross-entropy, which hears nobody; a live teacher has synthetic pictures
ONE_VALUE = {"losses.ce.loss", "losses.ce.teacher", "synthetic"}

TAUGHT: dict[str, Any] = {
    "teacher": {**TEACHER["teacher"], "params": {"width": 8}},
    "data": {"name": "digits", "views": 2},
    "losses": {"ce": {}, "kd": {}, "mid": {"loss": "mse", "layers": {"block1": "layer1"}}},
}


def leaves(content: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Dotted paths of all that is not a mapping; an empty one has none."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield above + key


def other(run: RunConfig, change: str, value: Any) -> RunConfig:
    return changed(run, {change.split(" @ ")[-1]: value})


def test_the_changes_above_are_of_every_leaf() -> None:
    named = {change.split(" @ ")[0] for change in OTHER | OTHER_TEACHER}
    leaves_ = set(leaves(plain(run_of(**TAUGHT))))
    assert leaves_ == named | NO_MATTER | ONE_TEACHER.keys() | ONE_VALUE


@pytest.mark.parametrize("change", [*OTHER, *OTHER_TEACHER])
def test_every_leaf_changes_the_identity(change: str) -> None:
    run = run_of(**TAUGHT)
    assert other(run, change, (OTHER | OTHER_TEACHER)[change]).identity != run.identity


# what the teacher's run must share with the run cannot be changed in one of them
@pytest.mark.parametrize("change", OTHER.keys() - {f"data.{key}" for key in SHARED})
def test_every_leaf_of_the_teacher_s_run_changes_the_identity(change: str) -> None:
    theirs = {**TOY, **TEACHER, "data": {**TOY["data"], "views": 2}}
    run = run_of(teacher={"run": theirs}, losses={"kd": {}})
    below = " @ ".join(f"teacher.run.{path}" for path in change.split(" @ "))
    assert other(run, below, OTHER[change]).identity != run.identity


# of every operation that is off in the runs above, every setting with another value
OTHER_AUGMENT: dict[str, dict[str, Any]] = {
    "resized_crop": {"area": [0.5, 1], "ratio": [0.5, 1]},
    "jitter": {
        "brightness": 0.1,
        "contrast": 0.1,
        "saturation": 0.1,
        "hue": 0.1,
        "probability": 0.1,
    },
    "randaugment": {"operations": 1, "magnitude": 5},
    "erase": {"probability": 0.1, "area": [0.1, 0.2], "ratio": [1, 2], "fill": 0},
    "mixup": {"alpha": 0.2, "probability": 0.1},
    "cutmix": {"alpha": 0.2, "probability": 0.1},
}


def augmented(**augment: Any) -> RunConfig:
    return run_of(data={"name": "digits", "views": 1, "augment": augment})


def test_the_settings_above_are_of_every_operation() -> None:
    whole = plain(AugmentConfig.model_validate({name: {} for name in OTHER_AUGMENT}))
    assert set(leaves(whole)) == {"crop", "flip"} | set(leaves(OTHER_AUGMENT))


@pytest.mark.parametrize("operation", OTHER_AUGMENT)
def test_every_operation_and_setting_changes_the_identity(operation: str) -> None:
    settings_ = [{}, *({key: value} for key, value in OTHER_AUGMENT[operation].items())]
    runs = [augmented(), *(augmented(**{operation: setting}) for setting in settings_)]
    assert len({run.identity for run in runs}) == len(runs)


def test_the_version_of_the_views_is_part_of_the_identity_where_there_are_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, plain_ = augmented(flip=True), run_of()
    before = seen.identity, plain_.identity
    monkeypatch.setattr("pipelines.identity.VIEWS_VERSION", VERSION + 1)
    assert (seen.identity != before[0], plain_.identity != before[1]) == (True, False)


def test_an_operation_that_is_off_is_not_written() -> None:
    # else every new operation would make another cache and another run of each old one
    assert plain(augmented(crop=2).data)["augment"] == {"crop": 2, "flip": False}
    assert "erase" in plain(augmented(erase={}).data)["augment"]
    again = changed(augmented(crop=2), {"data.augment.erase.probability": 0.25})
    assert again.data.augment.erase is not None
    assert again.data.augment.erase.probability == 0.25


@pytest.mark.parametrize(("leaf", "value"), [("epochs", [1]), ("gamma", 0.5)])
def test_every_leaf_of_the_steps_schedule_changes_the_identity(leaf: str, value: Any) -> None:
    run = run_of(optimizer={"schedule": {"name": "steps"}})
    assert changed(run, {f"optimizer.schedule.{leaf}": value}).identity != run.identity


@pytest.mark.parametrize("leaf", sorted(NO_MATTER))
def test_name_and_places_do_not_change_the_identity(leaf: str) -> None:
    run = run_of(teacher={"run": TOY}, losses={"kd": {}})
    values = {"data.download": True, "allow_custom_losses": True, "save_every": 7}
    other = values.get(leaf, {"name": "SVHN"} if leaf == "data.test" else "other")
    assert changed(run, {leaf: other}).identity == run.identity
    assert changed(run, {f"teacher.run.{leaf}": other}).identity == run.identity
    assert len(run.identity) == 12
    assert run.folder == Path("runs") / f"run-{run.identity}"


@pytest.mark.parametrize("leaf", ONE_TEACHER)
@pytest.mark.parametrize("bounds", [False, True])
def test_what_tells_teachers_apart_says_nothing_of_one(leaf: str, bounds: bool) -> None:
    run = run_of(**TAUGHT, diagnostics={"bounds": bounds})
    assert changed(run, {leaf: ONE_TEACHER[leaf]}).identity == run.identity


def identity_before_lists(run: RunConfig) -> str:
    """The digest of a run as it was when a run had one teacher."""
    content = plain(run)
    late = ("synthetic", "save_every", "allow_custom_losses", "min_workers")
    for key in ("name", "runs", "caches", "ensemble", *late):
        del content[key]
    for key in ("download", "spool", "test"):
        del content["data"][key]
    del content["diagnostics"]["teacher"]
    for key in ("classes", "classes_seed", "on_bad_image"):
        del content["data"][key]
    content["losses"] = {label: content["losses"][label] for label in run.active}
    for term in content["losses"].values():
        del term["teacher"]
    if not (run.is_taught or run.diagnostics.bounds):
        content["teacher"] = None
    elif run.teacher is not None:
        del content["teacher"]["label"], content["teacher"]["logits"]
        content["teacher"]["run"] = run.teacher.run and identity_before_lists(run.teacher.run)
    return digest(content)[:12]


BEFORE_LISTS = [path for path in SHIPPED if "synthetic" not in path.name]


@pytest.mark.parametrize("path", BEFORE_LISTS, ids=lambda path: path.name)
def test_runs_of_one_teacher_are_found_as_before_there_were_several(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no weights lie, which count by their content
    loaded = load(path)
    run = loaded.base if isinstance(loaded, SweepConfig) else loaded
    assert run.identity == identity_before_lists(run)


def test_a_listed_teacher_that_alone_is_heard_is_the_only_one() -> None:
    one = run_of(**KD)
    (label, teacher), *_ = one.teachers.items()
    assert run_of(teacher=[plain(teacher)], losses={"kd": {}}).identity == one.identity
    for listed in ([plain(teacher), BIG], [BIG, plain(teacher)]):
        for ensemble in ("logits", "probabilities"):
            both = run_of(teacher=listed, losses={"kd": {"teacher": label}}, ensemble=ensemble)
            assert both.identity == one.identity
    control = run_of(**TWO, losses={"ce": {}, "kd": {"weight": 0}})
    assert control.identity == run_of(losses={"ce": {}}).identity


DUET: dict[str, Any] = {"ce": {}, "kd": {}, "mid": {**MID, "teacher": "big"}}


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("ensemble", "logits"),
        ("losses.kd.teacher", "small"),
        ("losses.mid.teacher", "small"),
        ("teacher.0.weights", "other.safetensors"),
        ("teacher.1.precision", "bf16"),
        ("teacher", [BIG, SMALL, {**BIG, "label": "more"}]),
        ("teacher", [{**SMALL, "label": "big"}, {**BIG, "label": "small"}]),
        ("diagnostics", {"bounds": True, "teacher": "big"}),
    ],
)
def test_who_hears_whom_and_how_is_part_of_the_identity(change: str, value: Any) -> None:
    run = run_of(**TWO, losses=DUET)
    assert changed(run, {change: value}).identity != run.identity


def test_whose_bounds_are_measured_is_part_of_the_identity() -> None:
    runs = [
        run_of(**TWO, losses=DUET, diagnostics={"bounds": True, "teacher": label})
        for label in ("big", "small")
    ]
    assert runs[0].identity != runs[1].identity


def test_labels_are_only_names() -> None:
    run = run_of(**TWO, losses=DUET)
    renamed, named = {**BIG, "label": "strong"}, {**DUET, "mid": {**MID, "teacher": "strong"}}
    assert run_of(teacher=[renamed, SMALL], losses=named).identity == run.identity
    seen = changed(run, {"diagnostics.teacher": "small"})  # beside the student in a figure
    assert seen.identity == run.identity
    apart = run_of(**TWO, losses={"kd": {"teacher": "big"}, "mid": {**MID, "teacher": "small"}})
    assert changed(apart, {"ensemble": "logits"}).identity == apart.identity


def test_filled_in_defaults_do_not_change_the_identity() -> None:
    run = run_of(**TAUGHT)
    assert RunConfig.model_validate(plain(run)).identity == run.identity


@pytest.mark.parametrize("loss", [key for key in LOSSES if LOSSES[key].needs_teacher])
def test_the_control_is_one_run_whatever_loss_has_weight_0(loss: str) -> None:
    control = run_of(losses={"ce": {}})
    off = run_of(**TEACHER, losses={"ce": {}, "distill": {**line(loss), "weight": 0}})
    assert off.identity == control.identity
    on = changed(off, {"losses.distill.weight": 0.1})
    assert on.identity != control.identity


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_the_content_of_the_weights_file_is_the_identity_and_not_its_name(
    tmp_path: Path, whose: str
) -> None:
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    network = {"name": "resnet8", "weights": str(first)}
    run = run_of(**{**KD, whose: network})
    missing = run.identity
    first.write_bytes(b"one")
    before = run.identity
    second.write_bytes(b"one")
    assert changed(run, {f"{whose}.weights": str(second)}).identity == before
    first.write_bytes(b"two")
    assert len({missing, before, run.identity}) == 3


def test_the_weights_of_the_teacher_s_run_are_part_of_the_identity(tmp_path: Path) -> None:
    weights = tmp_path / "start.pth"
    weights.write_bytes(b"one")
    student = {"name": "resnet8", "weights": str(weights)}
    run = run_of(teacher={"run": {**TOY, "student": student}}, losses={"kd": {}})
    before = run.identity
    weights.write_bytes(b"two")
    assert run.identity != before


# --- round trip -------------------------------------------------------------------------------

finite = {"allow_nan": False, "allow_infinity": False}
RUNS = st.fixed_dictionaries(
    {
        "epochs": st.integers(1, 10**6),
        "workers": st.sampled_from([1, 2, 4]),
        "batch_size": st.integers(1, 1000).map(lambda quarter: 4 * quarter),
        "seed": st.integers(0, 2**63),
        "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
        "data": st.fixed_dictionaries(
            {"name": st.sampled_from(["digits", "CIFAR100"])},
            optional={
                "root": st.sampled_from(["a/b", "/c d"]),
                "size": st.integers(1, 512),
                "validation": st.floats(0.01, 0.99),
                "augment": st.fixed_dictionaries({"crop": st.integers(0, 8)}),
                "std": st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=3),
            },
        ),
        "optimizer": st.fixed_dictionaries(
            {"lr": st.floats(min_value=1e-12, **finite)},
            optional={
                "schedule": st.one_of(
                    st.fixed_dictionaries({"name": st.just("cosine"), "floor": st.floats(0, 1)}),
                    st.fixed_dictionaries(
                        {"name": st.just("steps"), "epochs": st.lists(st.integers(1, 99))}
                    ),
                )
            },
        ),
        "losses": st.dictionaries(
            st.from_regex(r"[a-z]{3,8}", fullmatch=True).map(lambda word: f"on_{word}"),
            st.tuples(
                st.sampled_from([line(key) for key in sorted(LOSSES)]), st.floats(1e-9, 1e9)
            ).map(lambda drawn: {**drawn[0], "weight": drawn[1]}),
            min_size=1,
            max_size=3,
        ),
        "teacher": st.sampled_from(
            [TEACHER["teacher"], {"run": "the same", "source": "live"}, [TEACHER["teacher"]]]
        ),
    }
)


@settings(deadline=None, max_examples=50)
@given(changes=RUNS)
def test_a_run_survives_yaml(changes: dict[str, Any]) -> None:
    if "augment" in changes.get("data", {}):
        changes = {**changes, "data": {"views": 1, **changes["data"]}}
    if "run" in changes.get("teacher", {}):  # on the same data
        theirs = {**TOY, "data": {**changes.get("data", TOY["data"]), "views": 0, "augment": {}}}
        changes = {**changes, "teacher": {**changes["teacher"], "run": theirs}}
    run = run_of(**changes)
    text = yaml.safe_dump(plain(run))
    again = RunConfig.model_validate(yaml.safe_load(text))
    assert again == run
    assert again.identity == run.identity


def test_how_many_logits_are_kept_is_part_of_the_identity_and_that_they_must_be_is_not() -> None:
    def keeping(logits: Any) -> str:
        return changed(run_of(**TAUGHT), {"teacher.logits": logits}).identity

    assert len({keeping(one) for one in ("float16", "uint8", {"top": 3}, {"top": 4})}) == 4
    assert keeping({"top": 3}) == keeping({"top": 3, "force": True})


def test_a_live_teacher_keeps_no_logits() -> None:
    with pytest.raises(ValueError, match=r"teacher: logits: how a cache keeps them.*is live"):
        changed(run_of(**TAUGHT), {"teacher.logits": "uint8", "teacher.source": "live"})


@pytest.mark.parametrize("logits", ["float32", {"top": 0}, {"tops": 3}])
def test_an_unknown_format_of_logits_is_refused(logits: Any) -> None:
    with pytest.raises(ValueError, match=r"teacher\.logits"):
        changed(run_of(**TAUGHT), {"teacher.logits": logits})


def test_a_password_in_the_address_of_caches_is_refused_without_its_words() -> None:
    with pytest.raises(ValueError, match="caches: the address holds a password") as refused:
        run_of(caches="s3://key:hunter2@bucket/caches")
    assert "hunter2" not in str(refused.value)
    assert run_of(caches="s3://bucket/caches@home").caches == "s3://bucket/caches@home"
