"""Threads and coroutines of one process: many writers to different chunks, readers while others write."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, chunk_attrs, create_array
from deepsic_codec.errors import CorruptPayload
from tests.common import psnr
from tests.concurrency.common import CHUNK, LIMIT, SHAPE, image, parts

KINDS = [{"zarr_format": 2}, {"zarr_format": 3}, {"shards": (64, 64, 3)}]


def make(store=None, **options):
    return create_array({} if store is None else store, shape=SHAPE, dtype="u1", chunks=CHUNK, **options)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("kind", ["dict", "path"])
def test_many_writers(options, kind, tmp_path):
    """Each thread writes its own chunks (or shards); what they wrote is what one writer would have written."""
    z = make(tmp_path / "a.zarr" if kind == "path" else None, **options)
    array, edge = image(0), 64 if "shards" in options else 32
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda part: z.__setitem__(part, array[part]), parts(edge), timeout=LIMIT))
    alone = make(**options)
    alone[...] = array
    assert psnr(z[...], array) > 30
    assert psnr(z[...], alone[...]) > 40
    for index in np.ndindex(4, 4, 1):
        assert chunk_attrs(z, index)["labels"]


@pytest.mark.parametrize("options", KINDS[:2], ids=str)
def test_readers_while_writing(options, tmp_path):
    """A reader sees a chunk as it was or as it is, never a mixture, and labels of the one or the other."""
    first, second = np.full(SHAPE, 40, "u1"), np.full(SHAPE, 200, "u1")
    z = make(tmp_path / "a.zarr", **options)
    z[...] = first
    dark, bright = z[0, 0].astype(int).mean(), 0.0
    stop, errors, seen = threading.Event(), [], set()

    def read():
        try:
            while not stop.is_set():
                for part in parts():
                    values = z[part]
                    assert np.ptp(values) < 30, "a mixture of two versions"
                    seen.add(bool(values.mean() > 120))
                chunk_attrs(z, (1, 1, 0))
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for values in (second, first, second):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda part, values=values: z.__setitem__(part, values[part]), parts(), timeout=LIMIT))
    stop.set()
    for reader in readers:
        reader.join(LIMIT)
        assert not reader.is_alive()
    assert not errors, errors
    bright = z[0, 0].astype(int).mean()
    assert dark < 60 and bright > 180 and seen


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_damaged_chunk_fails_alone_among_threads(options):
    z, array = make(**options), image(1)
    z[...] = array
    store = z.store._store_dict
    key = next(key for key in sorted(store) if key.endswith(("0/0/0", "0.0.0")))
    data = bytearray(store[key].to_bytes())
    data[len(data) // 2 if "shards" not in options else 60] ^= 255
    store[key] = type(store[key]).from_bytes(bytes(data))
    good, bad = [], []

    def read(part):
        try:
            good.append((part, z[part]))
        except CorruptPayload:
            bad.append(part)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, parts() * 3, timeout=LIMIT))
    assert len(bad) == 3 and len(good) == 45
    assert all(psnr(values, array[part]) > 28 for part, values in good)


def test_codecs_shared_by_threads():
    """One codec object, and several of other quality, from many threads: every payload is that of its own array."""
    codecs = [DeepSIC(quality=quality) for quality in (20, 50, 80)]
    arrays = [image(seed)[:48, : 40 + seed] for seed in range(6)]

    def both(number):
        codec, array = codecs[number % 3], arrays[number % 6]
        decoded = codec.decode(codec.encode(array))
        return decoded.shape == array.shape and psnr(decoded, array) > 24

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(both, range(60), timeout=LIMIT))


def test_one_event_loop():
    """zarr's asynchronous interface, hundreds of reads and writes in flight."""

    async def main():
        store, array = zarr.storage.MemoryStore(), image(3)
        made = await asyncio.to_thread(make, store)
        z = await zarr.api.asynchronous.open_array(store=store)
        await asyncio.gather(*(z.setitem(part, array[part]) for part in parts()))
        read = await asyncio.gather(*(z.getitem(part) for part in parts() * 8))
        return array, made[...], read

    array, whole, read = asyncio.run(asyncio.wait_for(main(), LIMIT))
    assert psnr(whole, array) > 30
    assert all(np.array_equal(values, whole[part]) for part, values in zip(parts() * 8, read, strict=True))


def test_a_cancelled_read_leaves_the_others():
    async def main():
        store, array = zarr.storage.MemoryStore(), image(4)
        made = await asyncio.to_thread(make, store)
        await asyncio.to_thread(made.__setitem__, Ellipsis, array)
        z = await zarr.api.asynchronous.open_array(store=store)
        tasks = [asyncio.create_task(z.getitem(part)) for part in parts()]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        again = await z.getitem(parts()[0])
        return array, results, again

    array, results, again = asyncio.run(asyncio.wait_for(main(), LIMIT))
    assert psnr(again, array[parts()[0]]) > 28
    for number, (part, values) in enumerate(zip(parts(), results, strict=True)):
        if number % 3:
            assert psnr(values, array[part]) > 28
        else:
            assert isinstance(values, asyncio.CancelledError | np.ndarray)


def test_threads_and_loops_together():
    array = image(5)
    z = make()
    z[...] = array
    whole = z[...]

    def loop(number):
        async def main():
            return await asyncio.gather(*(asyncio.to_thread(z.__getitem__, part) for part in parts()))

        return asyncio.run(main())

    with ThreadPoolExecutor(4) as pool:
        for read in pool.map(loop, range(4), timeout=LIMIT):
            assert all(np.array_equal(v, whole[part]) for part, v in zip(parts(), read, strict=True))
