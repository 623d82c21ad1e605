"""Writes a cache in processes that are killed one after the other, until one comes to the end.

Usage: python -m tests.pipelines.die_writing FOLDER SEED. Each dies at a random line of
pipelines/cache. Prints which files stood after each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pipelines import cache
from pipelines.cache import write as writing
from tests.pipelines.caches import (
    ROWS_PER_CRASH_FILE,
    crash_run,
    files_of,
    store_of,
    write,
    written_here,
)

CODE = str(Path(cache.__file__).parent)
MOST_LINES = 3000  # what a writer needs to see what is there, and a few files more


def die_after(lines: int) -> None:
    """Let this process be killed when it has passed this many lines of pipelines/cache."""

    def at_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines -= 1
            if lines < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return at_line

    def at_call(frame: FrameType, event: str, argument: Any) -> Any:
        return at_line if frame.f_code.co_filename.startswith(CODE) else None

    sys.settrace(at_call)


def main(folder: str, seed: str) -> None:
    torch.set_num_threads(1)
    writing.written = written_here
    run, drawn = crash_run(folder), random.Random(int(seed))
    root = Path(store_of(run).root)
    status = -1
    while status:
        lines = drawn.randrange(MOST_LINES)
        child = os.fork()
        if child == 0:
            die_after(lines)
            write(run, rows_per_file=ROWS_PER_CRASH_FILE)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps(files_of(root)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
