"""The interpreter ends while work is in flight: it exits, neither hanging nor crashing."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.common import ROOT
from tests.concurrency.common import LIMIT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

START = """
    import sys, threading, asyncio, atexit, time
    import numpy as np, zarr
    from deepsic_codec import DeepSIC, create_array
    from tests.concurrency.common import CHUNK, SHAPE, image, parts
    codec, array = DeepSIC(), image(0)
    payload = codec.encode(array)
    started = threading.Semaphore(0)
"""

SCRIPTS = {
    "keyboard interrupt": """
        import os, signal
        codec.decode(payload)  # compiled now: what interrupts a compiler is lost in its callbacks
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                codec.decode(codec.encode(array))
        except KeyboardInterrupt:
            print("interrupted")
        print(codec.decode(payload).shape)
        print("end")
    """,
    "daemon threads": """
        def work():
            while True:
                started.release()
                codec.decode(codec.encode(array))
        for _ in range(6):
            threading.Thread(target=work, daemon=True).start()
        for _ in range(8):
            started.acquire()
        print("end")
    """,
    "threads": """
        def work():
            for _ in range(3):
                started.release()
                codec.decode(codec.encode(array))
            print("done")
        for _ in range(4):
            threading.Thread(target=work).start()
        started.acquire()
        print("end")
    """,
    "pool": """
        from concurrent.futures import ThreadPoolExecutor
        pool = ThreadPoolExecutor(4)
        futures = [pool.submit(codec.encode, array) for _ in range(12)]
        print("end")
    """,
    "zarr in threads": """
        z = create_array({}, shape=SHAPE, dtype="u1", chunks=CHUNK)
        def work():
            while True:
                started.release()
                z[...] = array
                z[...]
        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        for _ in range(3):
            started.acquire()
        print("end")
    """,
    "event loop": """
        async def main():
            z = await zarr.api.asynchronous.open_array(store=store)
            tasks = [asyncio.create_task(z.setitem(part, array[part])) for part in parts()]
            await asyncio.sleep(0.01)
            print("end", flush=True)
        store = zarr.storage.MemoryStore()
        create_array(store, shape=SHAPE, dtype="u1", chunks=CHUNK)
        asyncio.run(main())
    """,
    "at exit": """
        def late():
            print(codec.decode(payload).shape)
            z = create_array({}, data=array, chunks=CHUNK)
        atexit.register(lambda: print(codec.decode(codec.encode(array)).shape))
        print("end")
    """,
    "a thread that outlives the main one": """
        def work():
            threading.main_thread().join()
            for _ in range(2):
                print(codec.decode(codec.encode(array)).shape)
        threading.Thread(target=work).start()
        print("end")
    """,
    "collected at the end": """
        class Holder:
            def __del__(self):
                try:
                    self.shape = codec.decode(payload).shape
                except Exception as error:
                    sys.stderr.write(f"refused: {type(error).__name__}\\n")
        holder = Holder()
        holder.self = holder
        print("end")
    """,
    "sys.exit in a batch": """
        def work():
            codec.decode(payload)
        thread = threading.Thread(target=work)
        thread.start()
        print("end")
        sys.exit(0)
    """,
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Exit status, stdout and stderr of every script."""
    scripts = {name: textwrap.dedent(START) + textwrap.dedent(code) for name, code in SCRIPTS.items()}
    job = {"scripts": scripts, "seconds": LIMIT, "folder": str(tmp_path_factory.mktemp("scripts"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "faulthandler", str(ROOT / "tests" / "concurrency" / "forker.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=LIMIT * len(scripts),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_interpreter_ends(ended, name):
    status, out, errors = ended[name]
    assert status is not None, f"hangs\n{out}\n{errors}"
    assert status == 0, f"status {status}\n{out}\n{errors}"
    assert "end" in out.split()
    assert "Fatal Python error" not in errors and "Segmentation" not in errors
    if name == "threads":
        assert out.count("done") == 4, "work that was begun is finished"
    if name in ("at exit", "a thread that outlives the main one"):
        assert "(128, 128, 3)" in out
    if name == "keyboard interrupt":
        assert out.split("\n")[:2] == ["interrupted", "(128, 128, 3)"]
