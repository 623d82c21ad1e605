"""Distil a teacher into students: cache its outputs, train, sweep, compare."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.console import (
    Bars,
    errors,
    print_outcome,
    print_plan,
    print_trained,
    say,
)
from pipelines.generative.config import GenerativeConfig
from pipelines.loading import load
from pipelines.runs import Run
from pipelines.space import SearchConfig, SweepConfig

if TYPE_CHECKING:  # Ray and MLflow take seconds to import: commands that need them do it
    from pipelines.submit import JobSubmissionClient

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Config = Annotated[Path, typer.Argument(help="A run or a sweep, as YAML.", show_default=False)]
Changes = Annotated[
    list[str], typer.Option("--set", help="Change a value: dotted.path=value; may be repeated.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray has to say.")]


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """One line for a mistake that the user can mend, exit code 2; --debug lets it through."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if options.get("debug"):
                raise
            known = isinstance(error, ValueError | OSError | RuntimeError | FloatingPointError)
            kind = "" if known else f"{type(error).__name__}: "  # Ray's own are of many kinds
            words = f"error: {kind}{error}"
            errors.print(words, style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return run


@app.command()
@_explained
def check(config: Config, changes: Changes = [], debug: Debug = False) -> None:
    """Check a configuration against its data and networks; train nothing."""
    from pipelines.preview import described

    for line in described(_as_sweep(load(config, changes))):
        say(line)


@app.command()
@_explained
def cache(
    config: Config,
    changes: Changes = [],
    info: Annotated[bool, typer.Option("--info", help="Only say what is in the caches.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only check what is there.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Only remove what is unfinished.")] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compute the teacher's outputs and keep them as Parquet."""
    from pipelines import caching

    loaded = _as_sweep(load(config, changes))
    if info:
        caching.show_caches(loaded.base)
    elif prune:
        caching.prune_caches(loaded.base)
    elif verify:
        raise typer.Exit(1 if caching.verify_caches(loaded.base) else 0)
    else:
        caching.write_caches(loaded, verbose=verbose)


@app.command()
@_explained
def train(
    config: Config,
    changes: Changes = [],
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Train one student (of a sweep: its base run), its teacher and cache first if need be."""
    run = _base(load(config, changes))
    if isinstance(run, GenerativeConfig):
        from pipelines.generative import jobs
    else:
        from pipelines import jobs
    from pipelines.tracking import Tracker

    with Bars() as watch:
        result = jobs.train(run, watch=watch, tracker=Tracker(), verbose=verbose)
    print_trained(run, result)


@app.command()
@_explained
def sweep(
    config: Annotated[Path | None, typer.Argument(help="A sweep, as YAML.")] = None,
    changes: Changes = [],
    resume: Annotated[
        str, typer.Option(help="Go on with the sweep of that name or folder, as it was begun.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Train every student of a sweep and rank them."""
    from pipelines import sweep as sweeps
    from pipelines.tracking import Tracker

    if (config is None) == (not resume):
        raise ValueError("expected a sweep's file, or the name of one by --resume")
    if resume and changes:
        raise ValueError("a sweep that is resumed is the one that was begun: leave --set out")
    loaded = _as_sweep(load(config, changes)) if config else sweeps.begun_sweep(resume)
    if dry_run:
        from pipelines.preview import plan_of

        print_plan(plan_of(loaded))
        return
    if isinstance(loaded.base, GenerativeConfig):
        from pipelines.generative.sweep import sweep as swept
    else:
        swept = sweeps.sweep
    with Bars() as watch:
        outcome = swept(
            loaded,
            watch=watch,
            show=watch.show,
            tracker=Tracker(),
            verbose=verbose,
            command=shlex.join(["kd", *sys.argv[1:]]),
        )
    print_outcome(loaded.name, loaded.search.metric, outcome)
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
@_explained
def report(
    config: Annotated[Path, typer.Argument(help="A sweep, as YAML, or its folder.")],
    changes: Changes = [],
    debug: Debug = False,
) -> None:
    """Write a finished sweep's report: one HTML page and its figures; trains nothing."""
    from pipelines.page import write_report
    from pipelines.ranking import sweep_folder

    folder = config if config.is_dir() else sweep_folder(_as_sweep(load(config, changes)))
    page, *figures = write_report(folder)
    say(f"report: {page}, with {len(figures)} figures")


@app.command()
@_explained
def synthesize(
    config: Annotated[Path, typer.Argument(help="A transfer set, as YAML.", show_default=False)],
    changes: Changes = [],
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Invent pictures from a teacher's weights, and keep them as a dataset with its answers."""
    from pipelines import jobs
    from pipelines.loading import load_transfer
    from pipelines.tracking import Tracker

    loaded = load_transfer(config, changes)
    with Bars() as watch:
        folder = jobs.synthesize(loaded, watch=watch, tracker=Tracker(), verbose=verbose)
    say(f"{loaded.count} pictures by {loaded.method}: {folder}")
    seen = f"mean: {[*loaded.mean]}, std: {[*loaded.std]}"
    say(
        f"train on them with `data: {{name: parquet, root: {folder}, {seen}}}`, and to test the "
        "students on real pictures say whose: `data: {..., test: {name: NAME, root: FOLDER}}`"
    )


@app.command()
@_explained
def evaluate(
    config: Config,
    changes: Changes = [],
    debug: Debug = False,
) -> None:
    """Evaluate the trained student of a run, or the best one of a sweep, on the test split."""
    from pipelines import jobs
    from pipelines.sweep import best_run

    loaded = load(config, changes)
    run = best_run(loaded) if isinstance(loaded, SweepConfig) else loaded
    result = jobs.finished(run)
    if result is None:
        raise ValueError(f"{config} has not been trained: no {run.folder}; run `kd train` first")
    if isinstance(run, GenerativeConfig):
        from pipelines.generative.jobs import evaluated

        measured = evaluated(run, result)
    else:
        measured = jobs.tested(run, jobs.trained_student(run, result))
    if not measured:
        raise ValueError(
            f"{config}: the data have no test part; name a dataset that has by `data.test`"
        )
    for name, value in measured.items():
        say(f"{name} {value:.4f}")


@app.command()
@_explained
def fuse(
    checkpoint: Annotated[
        Path, typer.Argument(help="The folder of a finished run, or a file in it.")
    ],
    debug: Debug = False,
) -> None:
    """Fuse the branches of a trained student into its plain network, and write that."""
    from pipelines.fused import fuse_checkpoint

    fused = fuse_checkpoint(checkpoint)
    before, after = fused.parameters
    say(f"{before:,} parameters in training, {after:,} fused")
    say(
        f"the same predictions for {fused.pictures} validation pictures; logits differ by "
        f"{fused.difference:.1e} of the greatest"
    )
    say(f"student: {fused.folder}")


@app.command()
@_explained
def losses(debug: Debug = False) -> None:
    """List every loss that a configuration may name, as Markdown."""
    from pipelines.catalogue import losses_table

    typer.echo(losses_table())


@app.command()
@_explained
def submit(
    config: Annotated[Path | None, typer.Argument(help="A run or a sweep, as YAML.")] = None,
    changes: Changes = [],
    address: Annotated[
        str, typer.Option(help="The dashboard of the cluster, http://HOST:PORT.")
    ] = "http://127.0.0.1:8265",
    folder: Annotated[
        Path | None,
        typer.Option(help="Where on the cluster to run; this folder's path without it."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="Run the cluster's own code, and send none.")
    ] = False,
    status: Annotated[str, typer.Option(help="Only say how that job is.")] = "",
    logs: Annotated[str, typer.Option(help="Only say what that job said.")] = "",
    stop: Annotated[str, typer.Option(help="Only stop that job.")] = "",
    debug: Debug = False,
) -> None:
    """Train a run or a sweep on a cluster elsewhere; Ctrl-C stops it unless it is detached."""
    from pipelines import submit as jobs

    if [config is not None, bool(status), bool(logs), bool(stop)].count(True) != 1:
        raise ValueError("expected either a file or a job's id by --status, --logs or --stop")
    loaded = load(config, changes) if config else None
    client = jobs.connected(address)
    if loaded is None:
        _tell_of_job(client, status=status, logs=logs, stop=stop)
        return
    job = jobs.submit(loaded, client, folder=folder or Path.cwd(), with_code=not installed)
    say(f"job {job}")
    if detach:
        return
    ended = jobs.follow(client, job, lambda words: typer.echo(words))
    say(f"job {job} {ended.value.lower()}")
    if ended.value != "SUCCEEDED":
        raise typer.Exit(1)


def _tell_of_job(client: JobSubmissionClient, *, status: str, logs: str, stop: str) -> None:
    from pipelines import submit as jobs

    if logs:
        typer.echo(client.get_job_logs(logs), nl=False)
        return
    if stop:
        client.stop_job(stop)
        jobs.ended(client, stop)
    say(jobs.described(client, status or stop))


@app.command()
@_explained
def ui(
    port: Annotated[int, typer.Option(help="Where to listen, on this machine only.")] = 5000,
    debug: Debug = False,
) -> None:
    """Open the MLflow UI on the store of runs, and say where it compares the last sweep's."""
    from pipelines.tracking import Tracker, comparison_address, without_password

    tracker = Tracker()
    if tracker.uri.startswith("http"):
        address = comparison_address(tracker, tracker.uri.rstrip("/"))
        raise ValueError(f"runs are tracked on a server: open {address} in a browser")
    address = comparison_address(tracker, f"http://127.0.0.1:{port}")
    say(f"MLflow on {without_password(tracker.uri)}; the last sweep's runs:")
    say(address)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    # not among its words, which everyone on this machine can read: it may hold a password
    store = {"MLFLOW_BACKEND_STORE_URI": tracker.uri}
    raise typer.Exit(subprocess.run(command, env={**os.environ, **store}).returncode)


def main() -> None:
    app()


def _base(loaded: Run | SweepConfig) -> Run:
    return loaded.base if isinstance(loaded, SweepConfig) else loaded


def _as_sweep(loaded: Run | SweepConfig) -> SweepConfig:
    """A run is a sweep over nothing."""
    if isinstance(loaded, SweepConfig):
        return loaded
    search = SearchConfig.model_validate({"metric": loaded.selects[0]})
    return SweepConfig(name=loaded.name, base=loaded, space={}, search=search)
