"""Small arrays, and what a child process should end with."""

import os
import subprocess
import sys
import textwrap

import numpy as np

from tests.common import ROOT, photograph

CHUNK = (32, 32, 3)
SHAPE = (128, 128, 3)  # 16 chunks
LIMIT = 120  # seconds after which a process counts as hanging


def image(seed):
    return photograph(*SHAPE, seed=seed)


def parts(edge=32):
    """Regions of whole chunks (or shards)."""
    return [np.s_[y : y + edge, x : x + edge] for y in range(0, SHAPE[0], edge) for x in range(0, SHAPE[1], edge)]


def finish(code, status=0, **environment):
    """Run a script in a fresh process; it has to end by itself with this status. Returns stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "faulthandler", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def wait(child):
    """Exit status of a forked child; -1 if it had to be killed for hanging."""
    import time

    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


def forked(function):
    """Run a function in a forked child; returns its exit status: 0 if it returned, 1 if it raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return wait(child)
