"""Workers that share a batch: one torch thread each, results in order, errors after the last task."""

import threading
import time

import numpy as np
import pytest
import torch

from deepsic_codec import config
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.model import torch_scheduler as scheduler_module
from deepsic_codec.model.device import Workers
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.torch_scheduler import TorchScheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import drone_frame


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_workers_have_one_torch_thread_each(threads):
    workers = Workers(2)
    assert workers.run([torch.get_num_threads] * 5) == [1] * 5 and torch.get_num_threads() == threads
    assert workers.run([Workers.is_worker] * 3) == [True] * 3 and not Workers.is_worker()
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads]


def test_results_in_order_and_the_first_error_after_all():
    done = []

    def task(number):
        time.sleep(0.01 * (number % 3))
        done.append(number)
        if number in (2, 5):
            raise ValueError(str(number))
        return number

    workers = Workers(3)
    assert workers.run([lambda i=i: task(i) for i in (4, 1, 3, 0)]) == [4, 1, 3, 0]
    with pytest.raises(ValueError, match="^5$"):
        workers.run([lambda i=i: task(i) for i in (0, 5, 1, 2, 7)])
    assert sorted(done) == sorted([4, 1, 3, 0, 0, 5, 1, 2, 7])


def test_the_caller_runs_tasks_that_the_pool_refuses():
    workers = Workers(2)
    workers._pool.shutdown()
    assert workers.run([lambda: 1, Workers.is_worker]) == [1, True] and not Workers.is_worker()


@pytest.fixture(scope="module")
def model():
    return TorchScheduler(LoadedModel(find_model("base")))


def test_workers_do_not_change_results(model, threads, monkeypatch):
    frame = drone_frame()
    images = [frame[None, y : y + 64, x : x + 96].copy() for y in (0, 300) for x in (0, 200, 400, 600)]
    images += [frame[None, :33, :40].copy()]
    qualities = [20.0, 50.0, 50.0, 77.7, 90.0, 5.0, 50.0, 50.0, 60.0]
    ran = []
    original = Workers.run
    monkeypatch.setattr(Workers, "run", lambda self, tasks: ran.append(len(tasks)) or original(self, tasks))

    def coded():
        result = model.encode(images, qualities)
        pixels = model.decode([f.features for f in result], [i.shape[:3] for i in images], qualities)
        return [f.features for f in result] + [f.cells.tobytes() for f in result] + [p.tobytes() for p in pixels]

    shared = coded()
    assert ran == [4, 4]  # eight of one shape in three parts, and one
    with config.set(threads=1):
        assert coded() == shared and len(ran) == 2
    torch.set_num_threads(threads)
    monkeypatch.setattr(scheduler_module, "WORKER_PIXELS", 1)
    assert coded() == shared and ran[2:] == [9, 9]


def test_the_batch_after_a_damaged_stream_works(model, threads):
    image = np.ascontiguousarray(drone_frame()[None, :64, :64])
    features = [model.encode([image], [50.0])[0].features] * 6
    with pytest.raises(CorruptPayload):
        model.decode([*features[:4], features[0] + bytes(range(1, 41)), features[0]], [(1, 64, 64)] * 6, [50.0] * 6)
    assert len(model.decode(features, [(1, 64, 64)] * 6, [50.0] * 6)) == 6
