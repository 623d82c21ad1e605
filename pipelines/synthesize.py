"""Transfer sets: pictures that a teacher's weights imply, made in a pool of actors, as Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.util import ActorPool

from kdcore.datafree.images import Normalisation
from kdcore.datafree.synthesis import Synthesizer
from kdcore.datafree.targets import Records, measure_records
from kdcore.datafree.transfer import TransferSet, transfer_set
from kdcore.taps import Tapped
from kdcore.types import Batch
from pipelines.build import build_teacher
from pipelines.cluster import worker_resources, workers_at_once
from pipelines.methods import layers_of
from pipelines.models import weights_digest
from pipelines.samples import grid, png, put
from pipelines.sources import Pictures, read_pictures
from pipelines.transfer import TransferConfig
from pipelines.transfer_sets import DONE, MANIFEST
from pipelines.views import normalised

SCHEMA_VERSION = 2
SAMPLES = "samples"
ROWS_OF_RECORDS = 256

Metrics = dict[str, float]
# told of every shard that is done: its number, how many are, of how many, what it measured
Watch = Callable[[int, int, int, Metrics], None]


@dataclass(frozen=True)
class _Shard:
    """One Parquet file: its number decides its pictures, the seed beside it."""

    number: int
    first: int  # picture of the set
    count: int

    def path(self, folder: Path) -> Path:
        # the name of a training part: the folder is the root of a dataset `parquet`
        return folder / f"train-{self.number:05d}.parquet"


def check_teacher_of(config: TransferConfig) -> None:
    """Raise ValueError for a teacher of which the method cannot make pictures, trained or not."""
    blank = config.teacher.model_copy(update={"weights": None})
    teacher = teacher_of(config.model_copy(update={"teacher": blank}))
    try:
        Synthesizer(teacher, config.plan, shape=config.shape, normalisation=_normalisation(config))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"method {config.method!r}: {error}") from error


def teacher_of(config: TransferConfig, weights: Path | None = None) -> Tapped:
    """The frozen teacher of a transfer set, which needs no picture to be built.

    ``weights`` are those of the run whose student it is, if it is one.
    """
    blank = np.zeros((1, *config.shape), np.uint8)
    pictures = Pictures(blank, np.zeros(1, np.int64), config.num_classes)
    return build_teacher(config.teacher, pictures, layers_of(config.plan), weights=weights)


def _normalisation(config: TransferConfig) -> Normalisation:
    return Normalisation(config.mean, config.std)


def provenance(config: TransferConfig, teacher: Tapped) -> dict[str, Any]:
    """The manifest: where the pictures come from, and every value that decides a byte of them."""
    return {
        "schema": SCHEMA_VERSION,
        "digest": config.identity,
        "teacher_digest": weights_digest(teacher.net),
        "device": _device(),
        **config.identity_content,
    }


def _device() -> str:
    """The kind of device on which the actors compute: sums on another have other last bits."""
    return "cuda" if "GPU" in worker_resources() else "cpu"


def sample_of_shard(folder: Path, shard: int) -> Path:
    """Where some pictures of a shard are drawn, if they are."""
    return folder / SAMPLES / f"{shard:05d}.png"


def is_made(folder: Path) -> bool:
    """Whether every file is there with the final marker."""
    return (folder / DONE).exists()


def write_transfer_set(config: TransferConfig, teacher: Tapped, watch: Watch) -> Path:
    """Write what is missing of a transfer set; shards that stand are not made again.

    The bytes do not depend on how many actors there are, nor on which of them made a shard.
    Returns the folder, which is the root of a dataset ``parquet``.

    Raises ValueError for a folder of other pictures and for more actors than there are cores,
    RuntimeError for what an actor cannot do.
    """
    folder = config.folder
    (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
    origin = provenance(config, teacher)
    _check_manifest(folder / MANIFEST, origin)
    shards = list(_shards(config))
    waiting = [shard for shard in shards if not shard.path(folder).exists()]
    done = len(shards) - len(waiting)
    for number, metrics in _made(waiting, config, teacher, origin):
        done += 1
        watch(number, done, len(shards), metrics)
    _mark(folder, shards)
    return folder


def _check_manifest(path: Path, content: dict[str, Any]) -> None:
    content = json.loads(json.dumps(content))  # as it will be read: lists for tuples
    if path.exists():
        held = json.loads(path.read_text())
        differing = [key for key in content if held.get(key) != content[key]]
        if differing:
            raise ValueError(
                f"{path} is of other pictures ({', '.join(differing)} differ); remove its folder "
                "or choose another `transfer_sets`"
            )
    put(path, (json.dumps(content, indent=1) + "\n").encode())


def _shards(config: TransferConfig) -> Iterator[_Shard]:
    for number, start in enumerate(range(0, config.count, config.shard_size)):
        yield _Shard(number, start, min(config.shard_size, config.count - start))


def _made(
    shards: list[_Shard], config: TransferConfig, teacher: Tapped, origin: dict[str, Any]
) -> Iterator[tuple[int, Metrics]]:
    """Make the shards in a pool of actors, yielding what each measured as it is done."""
    if not shards:
        return
    most = workers_at_once()
    size = min(len(shards), config.actors or most)
    resources = worker_resources()
    if size > ray.cluster_resources().get("CPU", 1):
        raise ValueError(f"actors: {size} is more than this cluster runs; leave it out for {most}")
    actor = ray.remote(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        max_restarts=2,
        max_task_retries=2,  # a shard that is made again is the same
    )(_Inventor)
    records = None if config.records is None else _records(config, teacher)
    shared = ray.put(_Inputs(config, teacher.cpu(), records, origin))
    actors = [actor.remote(shared, config.folder.absolute()) for _ in range(size)]
    try:
        pool = ActorPool(actors)
        yield from pool.map_unordered(lambda one, shard: one.make.remote(shard), shards)
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(f"the transfer set could not be made: {error.cause}") from error
    except ray.exceptions.RayActorError as error:
        # the last line says why, and goes on with what may be meant
        reason = str(error).strip().splitlines()[-1].strip().partition(". ")[0]
        raise RuntimeError(
            f"the transfer set could not be made: one of {size} actors died again and again "
            f"({reason}); what is done stands: run `kd synthesize` again, with fewer `actors` if "
            "they had too little memory"
        ) from error
    finally:  # also of one that is broken off, or they would go on making shards
        for one in actors:
            ray.kill(one)


@dataclass(frozen=True)
class _Inputs:
    """What all shards have in common."""

    config: TransferConfig
    teacher: Tapped
    records: Records | None
    origin: dict[str, Any]  # the manifest; an actor need not find the files that it names


class _Inventor:
    """A teacher in an actor: takes shards to make, returns their numbers and metrics."""

    def __init__(self, inputs: _Inputs, folder: Path) -> None:
        torch.set_num_threads(1)  # sums in one order, whatever the machine
        self.inputs, self.folder = inputs, folder
        device = torch.device(inputs.origin["device"])
        self.teacher = inputs.teacher.to(device)
        self.records = None if inputs.records is None else _moved(inputs.records, device)

    def make(self, shard: _Shard) -> tuple[int, Metrics]:
        config = self.inputs.config
        made = transfer_set(
            self.teacher,
            config.plan,
            shape=config.shape,
            normalisation=_normalisation(config),
            count=shard.count,
            seed=config.seed,
            shard=shard.number,
            first=shard.first,
            records=self.records,
        )
        if shard.number % config.samples_every == 0:
            put(sample_of_shard(self.folder, shard.number), png(grid(made.image.cpu().numpy())))
        put(shard.path(self.folder), self._file(made, shard))
        return shard.number, dict(made.metrics)

    def _file(self, made: TransferSet, shard: _Shard) -> bytes:
        rows = len(made.label)
        image = [{"bytes": png(one), "path": None} for one in made.image.cpu().numpy()]
        num_classes = made.logits.shape[1]
        # not Arrow's tensors, which Hugging Face's datasets refuse
        logits = pa.FixedSizeListArray.from_arrays(
            pa.array(made.logits.cpu().flatten().numpy()), num_classes
        )
        columns = {
            "image": pa.array(image, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(made.label.cpu().numpy(), pa.int64()),
            "logits": logits,
            "shard": pa.array(np.full(rows, shard.number), pa.int32()),
            "index": pa.array(np.arange(rows), pa.int32()),
        }
        origin = {**self.inputs.origin, "shard": shard.number, "torch": torch.__version__}
        metadata = {"kd": origin, "huggingface": _features(num_classes)}
        table = pa.table(columns).replace_schema_metadata(
            {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
        )
        written = io.BytesIO()
        pq.write_table(table, written, compression="zstd", row_group_size=1024)
        return written.getvalue()


def _features(num_classes: int) -> dict[str, Any]:
    """The columns as Hugging Face's datasets read them, which else see bytes and numbers."""
    names = [str(number) for number in range(num_classes)]
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": names},
        "logits": {
            "_type": "Sequence",
            "feature": {"_type": "Value", "dtype": "float32"},
            "length": num_classes,
        },
        "shard": {"_type": "Value", "dtype": "int32"},
        "index": {"_type": "Value", "dtype": "int32"},
    }
    return {"info": {"features": features}}


def _moved(records: Records, device: torch.device) -> Records:
    return Records(records.mean.to(device), records.covariance.to(device))


def _records(config: TransferConfig, teacher: Tapped) -> Records:
    assert config.records is not None
    pictures = read_pictures(config.records, "train")
    shape = tuple(pictures.image.shape[1:])
    if shape != config.shape:
        raise ValueError(
            f"records: their pictures have shape {shape}, and those of the set {config.shape}; "
            "set records.size, or name other pictures"
        )

    def batches() -> Iterator[Batch]:
        for start in range(0, len(pictures.label), ROWS_OF_RECORDS):
            rows = slice(start, start + ROWS_OF_RECORDS)
            image = torch.from_numpy(pictures.image[rows])
            label = torch.from_numpy(pictures.label[rows])
            yield Batch(normalised(image, mean=config.mean, std=config.std), label, label)

    return measure_records(teacher, batches(), config.num_classes)


def _mark(folder: Path, shards: list[_Shard]) -> None:
    """The final marker, with the checksum of every file, once every row is there."""
    listed = {}
    for shard in shards:
        path = shard.path(folder)
        count = pq.read_metadata(path).num_rows
        if count != shard.count:
            raise ValueError(
                f"{path} holds {count} rows instead of {shard.count}; remove it and run "
                "`kd synthesize` again"
            )
        listed[path.name] = {"rows": count, "sha256": sha256(path.read_bytes()).hexdigest()}
    put(folder / DONE, (json.dumps(listed, indent=1) + "\n").encode())
