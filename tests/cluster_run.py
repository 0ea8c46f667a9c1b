"""Write with two distributed workers of which one is killed, run by tests/test_dask.py; the folder is the argument."""

import os
import signal
import sys
import time
from pathlib import Path

import zarr
from distributed import Client, LocalCluster, WorkerPlugin

from deepsic_codec import config
from tests import stub_runtime
from tests.test_dask import check_index, check_same, image, save


def prepare():
    """In a worker: the stand-in for the model, slow enough to be killed at work."""
    stub_runtime.install()
    stub_runtime.RUNTIME.delay = lambda: time.sleep(0.5)


def encoded():
    """In a worker: how many chunks it has encoded."""
    return sum(stub_runtime.RUNTIME.sizes("encode"))


def settings():
    """In a worker: what its environment and `config.set_defaults` made of the settings."""
    return config.get().device, config.get().threads


class Prepare(WorkerPlugin):
    """Prepares workers, also those that are started again."""

    def setup(self, worker):
        """Run in each worker."""
        prepare()


def main(folder: Path) -> None:
    """Run."""
    stub_runtime.install()
    save(folder / "undisturbed.zarr")
    # Settings are the worker's own: from its environment, or set there; what is set here stays here.
    os.environ["DEEPSIC_DEVICE"] = "cpu"
    config.set_defaults(threads=7)
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        client.register_plugin(Prepare())
        client.run(config.set_defaults, threads=3)
        assert set(client.run(settings).values()) == {("cpu", 3)}
        delayed = save(folder / "a.zarr", compute=False, batch_size=4)
        future = client.compute(delayed)
        while not all(client.run(encoded).values()):
            time.sleep(0.05)
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        report = future.result(timeout=120)
        assert report.written == 40, report
    array = zarr.open_array(folder / "a.zarr", path="image", mode="r")
    assert (array[:] == image()).all()
    check_same(zarr.open_group(folder / "a.zarr", mode="r"), zarr.open_group(folder / "undisturbed.zarr", mode="r"))
    check_index(folder / "a.zarr")
    print("same")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
