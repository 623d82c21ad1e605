from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kdcore.datafree.plans import Offline
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.targets import Records
from kdcore.models import convnet
from pipelines import synthesize
from pipelines.build import build_teacher
from pipelines.cache.inspection import caches_in, inspected
from pipelines.cache.storage import store_at
from pipelines.cli import app
from pipelines.config import RunConfig
from pipelines.datasets import DataConfig
from pipelines.loading import load, load_transfer
from pipelines.sources import read_pictures
from pipelines.space import SweepConfig
from pipelines.strict import validated
from pipelines.sweep import sweep
from pipelines.tracking import Tracker, store_uri
from pipelines.train import Inputs, Teacher, train_here
from pipelines.transfer import TransferConfig
from pipelines.transfer_sets import DONE, MANIFEST
from pipelines.views import normalised

pytestmark = pytest.mark.usefixtures("local_ray")

OFFLINE = [name for name, one in PRESETS.items() if isinstance(one.schedule, Offline)]
COUNT, SHARD = 42, 8  # six shards, of which the last has two pictures


def quiet(shard: int, done: int, total: int, metrics: dict[str, float]) -> None:
    pass


@pytest.fixture
def content(workdir: Path) -> dict[str, Any]:
    """Inversion of a teacher that has seen a little, in six small files."""
    torch.manual_seed(3)
    teacher = convnet(4, 1, width=4)
    for _ in range(10):
        teacher(0.5 + torch.randn(32, 1, 8, 8))
    save_file(teacher.state_dict(), workdir / "teacher.safetensors")
    return {
        "teacher": {"name": "convnet", "params": {"width": 4}, "weights": "teacher.safetensors"},
        "method": "deepinversion",
        "change": {"schedule": {"steps": 6, "batch_size": 8}},
        "shape": [1, 8, 8],
        "num_classes": 4,
        "count": COUNT,
        "shard_size": SHARD,
        "samples_every": 3,
    }


def config(content: dict[str, Any], **changes: Any) -> TransferConfig:
    return validated(TransferConfig, {**content, **changes}, where="here")


def write(config: TransferConfig, watch: Any = quiet) -> Path:
    teacher = synthesize.teacher_of(config, Path("teacher.safetensors"))
    return synthesize.write_transfer_set(config, teacher, watch)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_one_actor_and_three_make_the_same_bytes(content: dict[str, Any]) -> None:
    one = write(config(content, actors=1, transfer_sets="one"))
    three = write(config(content, actors=3, transfer_sets="three"))
    assert digests(one) == digests(three)
    assert len(list(one.glob("train-*.parquet"))) == 6


def test_the_pictures_are_an_ordinary_dataset_with_the_teacher_s_answers(
    content: dict[str, Any],
) -> None:
    made = config(content, shard_size=6)  # less than a batch, and no multiple of the classes
    folder = write(made)
    pictures = read_pictures(DataConfig(name="parquet", root=folder), "train")
    assert pictures.image.shape == (COUNT, 1, 8, 8)
    assert pictures.num_classes == 4
    table = pq.read_table([str(path) for path in sorted(folder.glob("train-*.parquet"))])
    teacher = synthesize.teacher_of(made, Path("teacher.safetensors"))
    image = normalised(torch.from_numpy(pictures.image), mean=made.mean, std=made.std)
    with torch.no_grad():
        said = teacher(image).logits
    held = torch.tensor(table["logits"].to_pylist())
    torch.testing.assert_close(held, said)
    np.testing.assert_array_equal(table["label"].to_numpy(), pictures.label)
    np.testing.assert_array_equal(pictures.label, np.arange(COUNT) % 4)
    assert table["shard"].to_pylist() == [row // 6 for row in range(COUNT)]


def test_where_the_pictures_come_from_is_written_beside_and_inside_them(
    content: dict[str, Any],
) -> None:
    made = config(content, seed=5)
    folder = write(made)
    manifest = json.loads((folder / MANIFEST).read_text())
    inside = pq.read_schema(folder / "train-00002.parquet").metadata[b"kd"]
    assert json.loads(inside) == {**manifest, "shard": 2, "torch": torch.__version__}
    assert manifest["method"] == "deepinversion"
    assert manifest["plan"]["schedule"] == {"batch_size": 8, "steps": 6}
    assert manifest["seed"] == 5
    assert len(manifest["teacher_digest"]) == 64
    listed = json.loads((folder / DONE).read_text())
    assert [one["rows"] for one in listed.values()] == [8, 8, 8, 8, 8, 2]


def test_hugging_face_s_datasets_read_pictures_classes_and_answers(content: dict[str, Any]) -> None:
    schema = pq.read_schema(write(config(content, count=8)) / "train-00000.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert set(features) == set(schema.names)
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"_type": "ClassLabel", "names": ["0", "1", "2", "3"]}
    # a feature counts only where it is of its column's type
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert schema.field("label").type == pa.int64()
    assert schema.field("logits").type == pa.list_(pa.float32(), 4)
    assert (features["logits"]["length"], features["logits"]["feature"]["dtype"]) == (4, "float32")


def test_a_set_has_the_classes_of_its_teacher_whichever_its_pictures_are_of(
    content: dict[str, Any],
) -> None:
    made = config(content, count=2)
    folder = write(made)
    data = DataConfig(name="parquet", root=folder)
    pictures = read_pictures(data, "train")
    assert len(set(pictures.label.tolist())) < 4
    assert pictures.num_classes == 4


def test_a_set_that_is_not_finished_is_no_dataset(content: dict[str, Any]) -> None:
    folder = write(config(content, count=10))
    (folder / DONE).unlink()
    with pytest.raises(ValueError, match=r"unfinished transfer set.*run `kd synthesize` again"):
        read_pictures(DataConfig(name="parquet", root=folder), "train")


def test_only_what_is_missing_is_made(content: dict[str, Any]) -> None:
    made = config(content)
    folder = write(made)
    before = digests(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    (folder / "train-00003.parquet").unlink()
    (folder / DONE).unlink()
    assert not synthesize.is_made(folder)
    told: list[tuple[int, int, int]] = []
    write(made, lambda shard, done, total, metrics: told.append((shard, done, total)))
    assert told == [(3, 6, 6)]
    assert digests(folder) == before
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert {name for name in after if after[name] != times[name]} == {"train-00003.parquet"}


def test_a_write_that_breaks_off_is_resumed(content: dict[str, Any]) -> None:
    made = config(content, actors=1)

    def break_off(shard: int, done: int, total: int, metrics: dict[str, float]) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(made, break_off)
    assert not synthesize.is_made(made.folder)
    folder = write(made)
    assert synthesize.is_made(folder)
    assert digests(folder) == digests(write(config(content, transfer_sets="undisturbed")))


def test_a_file_with_rows_missing_is_refused(content: dict[str, Any]) -> None:
    made = config(content)
    file = write(made) / "train-00001.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(ValueError, match=r"train-00001.parquet holds 7 rows instead of 8"):
        write(made)


def test_a_folder_of_another_teacher_is_refused(content: dict[str, Any]) -> None:
    made = config(content)
    folder = write(made)
    manifest = folder / MANIFEST
    held = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**held, "teacher_digest": "0" * 64}))
    with pytest.raises(ValueError, match=r"of other pictures \(teacher_digest differ\)"):
        write(made)


def test_a_set_that_was_begun_on_another_kind_of_device_is_refused(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(content)
    assert json.loads((write(made) / MANIFEST).read_text())["device"] == "cpu"
    monkeypatch.setattr(synthesize, "worker_resources", lambda: {"CPU": 1, "GPU": 1})
    with pytest.raises(ValueError, match=r"of other pictures \(device differ\)"):
        write(made)


def test_an_actor_computes_on_the_device_that_the_manifest_names(content: dict[str, Any]) -> None:
    made = config(content)
    teacher = synthesize.teacher_of(made, Path("teacher.safetensors"))
    records = Records(torch.zeros(4, 4), torch.zeros(4, 4, 4))
    inputs = synthesize._Inputs(made, teacher, records, {"device": "meta"})
    actor = synthesize._Inventor(inputs, made.folder)
    tensors = [*actor.teacher.state_dict().values(), actor.records.mean, actor.records.covariance]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_what_an_actor_cannot_do_is_said_in_one_line(content: dict[str, Any]) -> None:
    state = load_file("teacher.safetensors")
    state["classifier.weight"].fill_(float("nan"))
    save_file(state, "teacher.safetensors")
    with pytest.raises(RuntimeError, match=r"^the transfer set could not be made: the loss of the"):
        write(config(content))


def test_an_actor_that_is_killed_is_said_in_one_line(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(synthesize._Inventor):
        def make(self, shard: Any) -> Any:
            os._exit(1)  # as who takes too much memory ends

    monkeypatch.setattr(synthesize, "_Inventor", Killed)
    with pytest.raises(RuntimeError, match=r"^the transfer .* one of 1 actors died.*`actors`.*$"):
        write(config(content, actors=1))


def test_more_actors_than_cores_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="actors: 6 is more than this cluster runs"):
        write(config(content, actors=99))


def test_records_are_taken_from_the_real_pictures(content: dict[str, Any]) -> None:
    torch.manual_seed(0)
    save_file(convnet(10, 1, width=4).state_dict(), "teacher.safetensors")
    real = {"name": "digits", "limit": 200}
    changes = {"method": "lopes", "records": real, "num_classes": 10, "count": 10}
    folder = write(config(content, **changes))
    assert pq.read_metadata(folder / "train-00000.parquet").num_rows == 8
    changes["records"] = {**real, "size": 16}
    with pytest.raises(ValueError, match=r"records: .*\(1, 16, 16\), and those of the set \(1, 8"):
        write(config(content, **changes))


@pytest.mark.parametrize("method", OFFLINE)
def test_a_set_of_every_offline_method_is_what_a_run_is_trained_on(
    method: str, content: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    save_file(convnet(10, 1, width=4).state_dict(), "teacher.safetensors")
    steps = min(2, PRESETS[method].schedule.steps)
    changes = {"method": method, "num_classes": 10, "count": 16}
    changes |= {"change": {"schedule": {"steps": steps, "batch_size": SHARD}}}
    if method == "lopes":
        changes["records"] = {"name": "digits", "limit": 200}
    folder = write(config(content, **changes))
    run = validated(
        RunConfig,
        {
            "student": {"name": "convnet", "params": {"width": 3}},
            "teacher": {**content["teacher"], "source": "live"},
            "data": {"name": "parquet", "root": str(folder), "validation": 0.5},
            "epochs": 2,
            "batch_size": 8,
            "optimizer": {"lr": 0.02},
            "losses": {"kd": {}},
        },
        where="here",
    )
    pictures = read_pictures(run.data, "train")
    ((label, teacher),) = run.teachers.items()
    live = build_teacher(teacher, pictures, set())
    held = Teacher(Path("teacher.safetensors"), live=live)
    result = train_here(run, Inputs(pictures, {label: held}), lambda metrics: None)
    losses = [told["train/loss"] for told in result.history]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("test", [None, {"name": "digits"}], ids=["untested", "tested on digits"])
def test_a_set_is_cached_and_swept_like_any_other_dataset(
    test: dict[str, str] | None, content: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    save_file(convnet(10, 1, width=4).state_dict(), "teacher.safetensors")
    folder = write(config(content, num_classes=10, count=32))
    base = {
        "student": {"name": "convnet", "params": {"width": 3}},
        "teacher": content["teacher"],
        "data": {"name": "parquet", "root": str(folder), "validation": 0.5, "test": test},
        "epochs": 1,
        "batch_size": 8,
        "losses": {"kd": {}},
    }
    space = {"losses.kd.params.temperature": {"grid": [1.0, 4.0]}}
    Path("sweep.yaml").write_text(yaml.safe_dump({"base": base, "space": space, "seeds": 2}))
    asked = load(Path("sweep.yaml"))
    assert isinstance(asked, SweepConfig)
    outcome = sweep(asked, watch=lambda *_: None, tracker=Tracker(), verbose=False)
    assert [len(row.values) for row in outcome.rows] == [2, 2]
    assert not outcome.failed
    (cache,) = caches_in(store_at(asked.base.caches))  # of which all four trials are
    assert {column.rows for column in inspected(cache).columns} == {32}
    assert ("test/top1" in outcome.test) == (test is not None)
    said = CliRunner().invoke(app, ["evaluate", "sweep.yaml"])
    assert ("test/top1" in said.output) == (test is not None), said.output
    assert test or "have no test part; name a dataset" in said.output


def test_the_command_makes_a_set_and_logs_it(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    Path("set.yaml").write_text(yaml.safe_dump(content))
    done = CliRunner().invoke(app, ["synthesize", "set.yaml", "--set", "count=10"])
    assert done.exit_code == 0, done.output
    folder = config(content, count=10, name="set").folder
    assert f"10 pictures by deepinversion: {folder}" in done.output
    client = MlflowClient(store_uri())
    experiment = client.get_experiment_by_name("kdsweep")
    (run,) = client.search_runs([experiment.experiment_id])
    assert {"statistics", "loss_last", "share/3"} <= set(run.data.metrics)
    assert run.data.params["change.schedule.steps"] == "6"
    (sample,) = [file.path for file in client.list_artifacts(run.info.run_id)]
    with Image.open(client.download_artifacts(run.info.run_id, sample)) as grid:
        assert grid.size == (16, 16)  # of eight pictures, two by two
    again = CliRunner().invoke(app, ["synthesize", "set.yaml", "--set", "count=10"])
    assert again.exit_code == 0
    wrong = CliRunner().invoke(app, ["synthesize", "set.yaml", "--set", "method=cmi"])
    assert wrong.exit_code == 2
    assert "has no transfer set" in wrong.output


def test_a_student_of_the_teacher_s_run_learns_from_its_set_and_is_tested_on_real_pictures(
    toy_run: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    teacher = {"run": str(toy_run.with_name("toy_teacher.yaml"))}
    made = {"method": "noise", "shape": [1, 8, 8], "num_classes": 10, "count": 64}
    Path("set.yaml").write_text(yaml.safe_dump({"teacher": teacher, **made}))
    folder = load_transfer(Path("set.yaml")).folder
    student = {
        "student": {"name": "convnet", "params": {"width": 3}},
        "teacher": teacher,
        "data": {"name": "parquet", "validation": 0.25, "views": 1, "test": {"name": "digits"}},
        "epochs": 1,
        "batch_size": 16,
        "losses": {"kd": {}},
    }
    Path("run.yaml").write_text(yaml.safe_dump(student))
    chosen = ["run.yaml", "--set", f"data.root={folder}"]
    for words in (["synthesize", "set.yaml"], ["train", *chosen], ["evaluate", *chosen]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    assert "test/top1" in done.output
    assert str(folder) in CliRunner().invoke(app, ["synthesize", "set.yaml"]).output
