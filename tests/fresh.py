"""Programs in a fresh interpreter that has loaded torch, but no host and nothing of this package.

Loading torch takes longer than most of these programs, so one process loads it for all of them,
and each runs in a fork of that.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

SERVER = """
import json, os, sys, traceback
import torch

def run(code, folder):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
    status = 1
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    """How a program ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, as its input does."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def run(code: str) -> Done:
    """What ``code`` does, run from the root of the repository."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        server.stdin.write(json.dumps([textwrap.dedent(code), folder]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        said = [Path(folder, name).read_text() for name in ("out", "err")]
    return Done(status, *said)
