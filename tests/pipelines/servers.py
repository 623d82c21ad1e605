"""Servers on this machine that a test starts, waits for and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_PATIENCE_S = 180  # imports alone take MLflow's processes half a minute on a busy machine


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str | Path],
    health: str,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Run a server until the block ends, which begins when the address ``health`` answers."""
    with subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True) as server:
        try:
            deadline = time.monotonic() + _PATIENCE_S
            while not answers(health):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, f"no answer from {health} in {_PATIENCE_S} s"
                time.sleep(0.5)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
