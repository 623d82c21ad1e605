"""A run or a sweep as a job of a cluster elsewhere, through Ray Jobs, with the code it needs."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.config import RunConfig
from pipelines.digests import plain
from pipelines.loading import as_yaml
from pipelines.space import SweepConfig

PACKAGES = ("kdcore", "pipelines")
POLL_S = 1.0
_FILE = "job.yaml"

Say = Callable[[str], None]


def connected(address: str) -> JobSubmissionClient:
    """The jobs of the cluster whose dashboard is at ``address``, http://HOST:PORT.

    The token is the one of RAY_AUTH_TOKEN or of the file RAY_AUTH_TOKEN_PATH, and only
    RAY_AUTH_MODE=disabled goes without: what a home directory happens to hold decides nothing.

    Raises ValueError where there is none, and ConnectionError where nobody answers.
    """
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return JobSubmissionClient(address)
    # not by the environment, which Ray read when it was imported
    return JobSubmissionClient(address, headers={"Authorization": f"Bearer {_token()}"})


def _token() -> str:
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return Path(path).read_text().strip()
    raise ValueError(
        "expected the cluster's token in RAY_AUTH_TOKEN or its file in RAY_AUTH_TOKEN_PATH, found "
        "neither; a cluster that asks for none needs RAY_AUTH_MODE=disabled"
    )


def submit(
    config: RunConfig | SweepConfig, client: JobSubmissionClient, *, folder: Path, with_code: bool
) -> str:
    """Start the run or the sweep in ``folder`` of the cluster, and return the job's id.

    The folder is to be one that all nodes share: it gets ``runs``, ``caches`` and, without a
    tracking server, MLflow's store, and paths in the configuration are relative to it. With
    ``with_code`` the job runs this very code, whether or not the nodes have the package.
    """
    command = "sweep" if isinstance(config, SweepConfig) else "train"
    variables = {"PYTHONUNBUFFERED": "1", **_tracking()}
    with _staged(config, with_code=with_code) as working_dir:
        return client.submit_job(
            # Ray starts it where it unpacked the files, which is gone after the job
            entrypoint=(
                f'file="$PWD/{_FILE}"; cd {shlex.quote(str(folder))} && '
                f'exec python -m pipelines {command} "$file"'
            ),
            runtime_env={"working_dir": str(working_dir), "env_vars": variables},
            metadata={"name": config.name, "command": command},
        )


def follow(client: JobSubmissionClient, job: str, say: Say) -> JobStatus:
    """Say what the job says until it ends; if this is interrupted, the job is stopped first."""
    try:
        asyncio.run(_repeat_logs(client, job, say))
        return ended(client, job)
    except KeyboardInterrupt:
        client.stop_job(job)
        say(f"stopping {job}")
        ended(client, job)
        raise


def ended(client: JobSubmissionClient, job: str) -> JobStatus:
    """How the job ended, waiting for it."""
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(POLL_S)
    return status


def described(client: JobSubmissionClient, job: str) -> str:
    """The job's state in a line."""
    info = client.get_job_info(job)
    name = (info.metadata or {}).get("name", "")
    return f"{job} {name} {info.status.value.lower()}: {info.message}"


async def _repeat_logs(client: JobSubmissionClient, job: str, say: Say) -> None:
    async for lines in client.tail_job_logs(job):
        say(lines.rstrip("\n"))


def _tracking() -> dict[str, str]:
    """The tracking server's address for the job, where there is one."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith("http"):  # a file of this machine is none of the cluster's
        return {}
    if "@" in urlsplit(uri).netloc:
        raise ValueError(
            "MLFLOW_TRACKING_URI holds a password, which everyone who sees the job would read; "
            "give the nodes MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )
    return {"MLFLOW_TRACKING_URI": uri}


@contextmanager
def _staged(config: RunConfig | SweepConfig, *, with_code: bool) -> Iterator[Path]:
    """A folder of what the job needs and nothing else: no file of the user's is sent along."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / _FILE).write_text(as_yaml(plain(config)))
        for package in PACKAGES if with_code else ():
            source = Path(__file__).parents[1] / package
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / package, ignore=unwanted)
        yield folder
