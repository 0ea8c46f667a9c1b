"""Processes: forked before and after the model was loaded, spawned, forked in the middle of work, many writers."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, chunk_attrs, config, create_array, open_archive
from tests.common import psnr
from tests.concurrency.common import CHUNK, LIMIT, SHAPE, finish, forked, image, parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
]


def write(path, number, edge):
    """What a worker process does: every third region."""
    z = zarr.open(path, mode="r+")
    array = image(0)
    for part in parts(edge)[number::3]:
        z[part] = array[part]
    return psnr(z[parts(edge)[number]], array[parts(edge)[number]])


def write_and_read(path, number, barrier):
    """What a spawned process does: write every other region, wait for the other process, print the sum of all."""
    z = zarr.open(path, mode="r+")
    for part in parts()[number::2]:
        z[part] = image(0)[part]
    barrier.wait(LIMIT)
    print(read(path).sum(dtype="i8"), flush=True)


def read(path):
    return zarr.open(path, mode="r")[...]


@pytest.mark.parametrize("options", [{"zarr_format": 2}, {"zarr_format": 3}, {"shards": (64, 64, 3)}], ids=str)
def test_many_writers(options, tmp_path):
    path = str(tmp_path / "a.zarr")
    DeepSIC().encode(image(1))  # the model is loaded, with all its threads, before the fork
    create_array(path, shape=SHAPE, dtype="u1", chunks=CHUNK, **options)
    edge = 64 if "shards" in options else 32
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool:
        done = [pool.submit(write, path, number, edge) for number in range(3)]
        assert all(future.result(LIMIT) > 26 for future in done)
        theirs = pool.submit(read, path).result(LIMIT)
    mine = read(path)
    assert psnr(mine, image(0)) > 30 and psnr(theirs, mine) > 45
    assert all(chunk_attrs(open_archive(path), index)["labels"] for index in np.ndindex(4, 4, 1))


def test_fork_of_a_fork_after_the_model_was_loaded():
    codec, array = DeepSIC(), image(2)
    payload = codec.encode(array)
    expected = codec.decode(payload)

    def grandchild():
        assert psnr(codec.decode(payload), expected) > 45
        assert psnr(codec.decode(codec.encode(array)), array) > 30

    def child():
        grandchild()
        assert forked(grandchild) == 0
        grandchild()

    assert forked(child) == 0
    grandchild()


def test_fork_while_other_threads_work():
    """The child has none of the threads that hold the locks; it has to work all the same, and so has the parent."""
    codec, array = DeepSIC(), image(3)
    payload = codec.encode(array)
    stop, failures = threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                codec.decode(codec.encode(array))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(6):
            assert forked(lambda: codec.decode(payload)) == 0
            assert forked(lambda: codec.encode(array)) == 0
    finally:
        stop.set()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a thread of the parent hangs"
    assert not failures


def test_fork_where_a_number_of_threads_is_set():
    """The parent's OpenMP threads are not there to work for the child, whatever the configuration asks for."""
    codec, array = DeepSIC(), image(5)
    with config.set(threads=2):
        payload = codec.encode(array)
        assert forked(lambda: codec.decode(payload)) == 0
        assert forked(lambda: codec.encode(array)) == 0


def test_fork_with_an_array_open():
    """zarr's own threads and event loop do not survive a fork; reading through a new array of the child does."""
    finish("""
        import os, numpy as np, zarr
        from deepsic_codec import create_array
        from tests.concurrency.common import CHUNK, forked, image
        store = {}
        z = create_array(store, data=image(0), chunks=CHUNK)
        expected = z[...]

        def child():
            assert np.abs(zarr.open(store, mode="r")[...].astype(int) - expected).max() <= 1
            again = zarr.open(store, mode="r+")
            again[:32, :32] = image(1)[:32, :32]

        assert forked(child) == 0
        assert (z[...] == expected).all()
    """)


def test_spawned_by_a_process_that_never_used_it(tmp_path):
    """Two writers, each of which then reads what both wrote."""
    path = str(tmp_path / "a.zarr")
    z = create_array(path, shape=SHAPE, dtype="u1", chunks=CHUNK)
    out, _ = finish(f"""
        import multiprocessing
        from tests.concurrency.test_processes import write_and_read
        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            barrier = context.Barrier(2)
            writers = [context.Process(target=write_and_read, args=({path!r}, number, barrier)) for number in range(2)]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
                assert writer.exitcode == 0
    """)
    found = out.split()
    assert len(found) == 2 and found[0] == found[1] == str(z[...].sum(dtype="i8"))
    assert psnr(z[...], image(0)) > 30
    assert all(chunk_attrs(z, index)["labels"] for index in np.ndindex(4, 4, 1))
