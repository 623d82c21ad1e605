"""One student: the loop in this process, or on the workers of Ray Train."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import ray.train
import torch
from filelock import FileLock
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import LoggingConfig
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kdcore.rows import num_workers
from kdcore.taps import Tapped
from kdcore.types import Classifier
from pipelines.build import build_step
from pipelines.cluster import num_cores, work_in, worker_resources, workers_at_once
from pipelines.config import RunConfig
from pipelines.data import Reader, TeacherRows
from pipelines.digests import plain
from pipelines.loop import BEST, LAST, STATE, Metrics, Progress, Report, fit, keep, pick_device
from pipelines.models import read_state
from pipelines.runs import Run, run_of
from pipelines.sources import Pictures

RESULT = "result.json"
MAX_FAILURES = 3  # of a run's workers; an error of its own comes again, and ends it
# of workers in vain, a minute each: a node that comes instead of a lost one takes some to start
STARTS = 30
REGROW_S = 60.0  # between looks for nodes on which workers that are lacking could be
_RAY_FOLDER, _LOCK = "workers", ".lock"
OnEpoch = Callable[[Metrics], None]


@dataclass(frozen=True)
class Teacher:
    """A teacher that is ready to be heard: as cached rows or as a live network."""

    weights: Path
    live: Tapped | None = None
    rows: TeacherRows | None = None  # cached
    fingerprint: str = ""  # of the cache
    accuracy: float | None = None  # on the validation split, where it is cached

    @property
    def classifier(self) -> Classifier | None:
        if self.live is not None:
            return self.live.head
        return None if self.rows is None else self.rows.classifier


@dataclass(frozen=True)
class Inputs:
    """What a run trains on: pictures, and its teachers by label."""

    pictures: Pictures
    teachers: Mapping[str, Teacher] = field(default_factory=dict)

    @property
    def rows(self) -> Mapping[str, TeacherRows]:
        """Of the teachers that are cached."""
        return {name: held.rows for name, held in self.teachers.items() if held.rows is not None}

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """Of every teacher, live or cached."""
        held = {name: teacher.classifier for name, teacher in self.teachers.items()}
        return {name: classifier for name, classifier in held.items() if classifier is not None}

    @property
    def fingerprint(self) -> str:
        """Of every cache, a blank between them."""
        return " ".join(held.fingerprint for held in self.teachers.values() if held.fingerprint)

    def only(self, labels: Iterable[str]) -> Inputs:
        """The same with the teachers of these labels; ValueError where one is not ready."""
        wanted = list(labels)
        lacking = [label for label in wanted if label not in self.teachers]
        if lacking:
            raise ValueError(
                f"the run listens to teacher {lacking[0]!r}, which was not made ready; of a sweep "
                "the base, or one of the listed values alone, must listen to it"
            )
        return replace(self, teachers={label: self.teachers[label] for label in wanted})

    def fit(
        self, run: RunConfig, *, report: Report, resume: Path | None = None, rank: int = 0
    ) -> Progress:
        """Train the run in this process, or this worker's part of it."""
        ready, device = self.only(run.heard), pick_device()
        workers = num_workers()
        return fit(
            run,
            build_step(run, ready.pictures, ready.classifiers),
            Reader(run, ready.pictures, ready.rows, rank, workers),
            report=report,
            resume=resume,
            live=ready.live(device),
            device=device,
        )

    def live(self, device: torch.device) -> Mapping[str, Tapped]:
        """The live teachers, on the device."""
        return {
            name: held.live.to(device)
            for name, held in self.teachers.items()
            if held.live is not None
        }


class RunInputs(Protocol):
    """What a run of any kind trains on, which knows how."""

    fingerprint: str  # of every cache, a blank between them

    def fit(
        self, run: Any, *, report: Report, resume: Path | None = None, rank: int = 0
    ) -> Progress:
        """Train the run in this process, or this worker's part of it."""
        ...


@dataclass(frozen=True)
class Finished:
    """A run that is done, as its folder tells."""

    folder: Path
    history: list[Metrics]
    best: Metrics

    @property
    def weights(self) -> Path:
        """The student of the epoch that was best on the validation split."""
        return self.folder / BEST


def finished(run: Run) -> Finished | None:
    """The result of this very run, if it has been trained to its end."""
    file = run.folder / RESULT
    if not file.exists():
        return None
    held = json.loads(file.read_text())
    return Finished(run.folder, held["history"], held["best"])


def train_here(run: Run, inputs: RunInputs, on_epoch: OnEpoch) -> Finished:
    """Train in this process, going on from the run's own checkpoint where there is one."""
    with _alone(run) as done:
        return _told(done, on_epoch) if done else _train_here(run, inputs, on_epoch)


def _train_here(run: Run, inputs: RunInputs, on_epoch: OnEpoch) -> Finished:
    def report(metrics: Metrics | None, folder: Path | None) -> None:
        if folder is not None:
            keep(folder, run.folder)
        if metrics is not None:
            on_epoch(metrics)

    resume = run.folder if (run.folder / STATE).exists() else None
    return _finish(run, inputs.fit(run, report=report, resume=resume))


def branch_off(run: Run, parent: Run, *, epochs: int) -> None:
    """Let a run begin with a copy of what another is after so many epochs, in which both agree.

    Nothing is done where the run has a state already, or where the parent is not there, or further
    on: the run is then trained from its beginning, to the same numbers.
    """
    with _alone(parent):
        if (run.folder / STATE).exists() or not (parent.folder / STATE).exists():
            return
        state = torch.load(parent.folder / STATE, map_location="cpu", weights_only=True)
        if len(state["history"]) != epochs or state["sums"]["steps"]:
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".arriving-", dir=run.folder) as folder:
            for name in (BEST, LAST, STATE):
                shutil.copy(parent.folder / name, folder)
            keep(Path(folder), run.folder)


def train_on_workers(run: Run, inputs: RunInputs, on_epoch: OnEpoch) -> Finished:
    """Train with DDP on the run's workers of Ray Train, following them from this process."""
    with _forwarded(on_epoch) as callback:
        return train_with_callback(run, ray.put(inputs), callback, on_epoch)


def train_with_callback(
    run: Run, inputs: ray.ObjectRef, callback: UserCallback, on_epoch: OnEpoch
) -> Finished:
    """Train with DDP on workers whose reports ``callback`` receives in Ray Train's controller.

    ``inputs`` is in the object store; ``on_epoch`` is told the epochs of a run found finished.

    Raises ValueError where the cluster can never hold so many workers: Ray would wait for ever.
    """
    fewest = run.min_workers or run.workers
    if fewest > workers_at_once():
        name = "workers" if run.min_workers is None else "min_workers"
        raise ValueError(
            f"{name}: {fewest} are more than the {workers_at_once()} that this cluster can "
            f"run at once; lower `{name}` or add nodes"
        )
    with _alone(run) as done:
        if done:
            return _told(done, on_epoch)
        try:
            checkpoint = _trainer(run, inputs, callback).fit().checkpoint
        except ray.train.WorkerGroupError as error:
            rank, cause = next(iter(error.worker_failures.items()))
            raise RuntimeError(f"worker {rank}: {cause}") from error
        with checkpoint.as_directory() as folder:
            copied = Path(shutil.copytree(folder, run.folder / ".arriving", dirs_exist_ok=True))
        keep(copied, run.folder)
        copied.rmdir()
        state = read_state(run.folder / STATE, torch.device("cpu"))
        result = _finish(run, Progress(state["history"], state["best"]))
        shutil.rmtree(run.folder / _RAY_FOLDER, ignore_errors=True)
        return result


def _trainer(run: Run, inputs: ray.ObjectRef, callback: UserCallback) -> TorchTrainer:
    resources = worker_resources()
    return TorchTrainer(
        _worker,
        train_loop_config={"run": plain(run), "inputs": [inputs], "folder": Path.cwd()},
        torch_config=TorchConfig(backend="nccl" if "GPU" in resources else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(run.min_workers, run.workers) if run.min_workers else run.workers,
            elastic_resize_monitor_interval_s=REGROW_S,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
        ),
        run_config=RayRunConfig(
            # the folder carries the run's identity: only this very run goes on from what is there
            name=_RAY_FOLDER,
            storage_path=str(run.folder.absolute()),
            # of losses that nobody announced: Ray does not count spot instances taken back
            failure_config=FailureConfig(
                max_failures=MAX_FAILURES,
                controller_failure_limit=STARTS,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[callback],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


@contextmanager
def _alone(run: Run) -> Iterator[Finished | None]:
    """The run's folder for this process alone; whoever had to wait may find the run finished."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(run.folder / _LOCK):
        yield finished(run)


def _told(done: Finished, on_epoch: OnEpoch) -> Finished:
    for metrics in done.history:
        on_epoch(metrics)
    return done


@contextmanager
def _forwarded(on_epoch: OnEpoch) -> Iterator[_Forward]:
    """A callback that reports to this process, though it runs in Ray Train's controller."""
    # on this process's node: it must outlive those of the workers
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    failures: list[BaseException] = []

    def listen() -> None:
        while (metrics := queue.get()) is not None:
            try:
                on_epoch(metrics)
            except BaseException as error:  # not to be lost in this thread
                failures.append(error)

    listener = Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield _Forward(queue)
    finally:
        queue.put(None)
        listener.join()
        queue.shutdown()
    if failures:
        raise failures[0]


class _Forward(UserCallback):
    """Runs in Ray Train's controller: sends what the first worker reports to the driver."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_report(self, run_context: Any, metrics: list[Metrics], checkpoint: Any) -> None:
        if metrics[0]:  # nothing in the middle of an epoch
            self._queue.put(metrics[0])


def _worker(config: dict[str, Any]) -> None:
    work_in(config["folder"])
    context = ray.train.get_context()
    run, held = run_of(config["run"]), config["inputs"][0]
    inputs: RunInputs = ray.get(held)
    # not by how many are on this node: sums are rounded by the number of threads, and a run that
    # goes on elsewhere is to have the same numbers
    torch.set_num_threads(max(1, num_cores() // run.workers))

    def report(metrics: Metrics | None, folder: Path | None) -> None:
        checkpoint = None if folder is None else Checkpoint.from_directory(str(folder))
        ray.train.report(metrics or {}, checkpoint=checkpoint)

    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
        inputs.fit(
            run,
            report=report,
            resume=Path(folder) if folder else None,
            rank=context.get_world_rank(),
        )


def _finish(run: Run, progress: Progress) -> Finished:
    """Write the run's final marker: it is finished because this file is there."""
    content = {"run": plain(run), "history": progress.history, "best": progress.best}
    arriving = run.folder / f".{RESULT}"
    arriving.write_text(json.dumps(content, indent=1) + "\n")
    arriving.replace(run.folder / RESULT)
    return Finished(run.folder, progress.history, progress.best or {})
