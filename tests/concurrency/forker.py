"""Run scripts, each in a fork of a process that imported the large libraries, and print how each ended.

Importing takes seconds, and each script needs a process of its own, as the tests are about how that process ends. What
is imported before the fork starts no thread, and each script imports the runtime of the package itself: to the runtime,
its process is no fork.

Standard input has JSON: scripts by name, the seconds after which a script counts as hanging, and an empty folder.
Standard output has JSON: for each name exit status (None for a script that had to be killed), stdout and stderr.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path


def status_of(child, seconds):
    """Exit status of a child, negative for a signal; None if it had to be killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def main():
    """Run all scripts; in a child, return its script, which then ends as a main program does."""
    import numba  # noqa: F401
    import torch  # noqa: F401
    import zarr

    job = json.load(sys.stdin)
    assert threading.active_count() == 1 and zarr.core.sync.iothread[0] is None
    assert not [name for name in sys.modules if name.startswith("deepsic_codec")]
    results = {}
    for number, (name, code) in enumerate(job["scripts"].items()):
        files = [Path(job["folder"]) / f"{number}-{part}" for part in ("stdout", "stderr")]
        child = os.fork()
        if child == 0:
            for descriptor, path in enumerate(files, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
            return code
        results[name] = [status_of(child, job["seconds"]), *(path.read_text() for path in files)]
    json.dump(results, sys.stdout)
    return ""


if __name__ == "__main__":
    exec(compile(main(), "script", "exec"))
