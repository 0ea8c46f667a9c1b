"""The benchmark's own parts: what it watches and what it leaves behind."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import scale
from deepsic_codec import DeepSIC, config
from deepsic_codec.bulk.write import BlockReport, PackedStarts
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.zoo import find_model


def test_progress_is_told_with_memory_at_each_tenth(monkeypatch, capsys):
    monkeypatch.setattr(scale, "TELL", 0)
    watch = scale._Watch(4000)
    for _ in range(40):
        watch._posttask("block", BlockReport(PackedStarts((1,)), samples=100))
        watch._posttask("other", "no block")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 40 and told[9].startswith(" 25%") and "s left" in told[9] and "the index" in told[-1]
    assert [share for share, _ in watch.memory] == pytest.approx([n / 10 for n in range(1, 11)])
    assert all(mib > 0 for _, mib in watch.memory)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_in_the_folder(tmp_path, error):
    args = SimpleNamespace(folder=str(tmp_path / "disk"))
    try:
        with scale._folder(args) as folder:
            (folder / "a.zarr").mkdir()
            assert folder.parent == tmp_path / "disk"
            if error is not None:
                raise error
    except (KeyboardInterrupt, SystemExit):
        pass
    assert not any((tmp_path / "disk").iterdir())


def test_a_step_that_fails_says_so(tmp_path, capfd):
    args = SimpleNamespace(folder=str(tmp_path), width=8, device="nowhere", threads=1, image=None)
    with pytest.raises(SystemExit, match="'archive' failed"):
        scale._in_child(args, "archive", height=8)
    assert "nowhere" in capfd.readouterr().err and not any(tmp_path.iterdir())


def test_stages_on_a_gpu_are_measured_with_kernels_and_without(monkeypatch, capsys):
    seen = []

    def work(runtime, codec, chunks):
        seen.append((config.get().kernels, config.get().batch_pixels, len(chunks)))
        names = ["analysis", "analysis and optimised quantisation", "synthesis", "prior and entropy coder, encode"]
        names += ["prior and entropy coder, decode", "encode, end to end", "decode, end to end"]
        return dict.fromkeys(names, lambda: time.sleep(1e-4))

    monkeypatch.setattr(scale, "_stages", work)
    monkeypatch.setattr(scale, "_by_batch", lambda chunks, repeats: [(size, 1.0, 2.0) for size in scale.BATCHES])
    monkeypatch.setattr(scale, "_prepare", lambda device, threads: None)
    monkeypatch.setattr("deepsic_codec.model.scheduler.get_scheduler", lambda info: None)
    verdict = scale.stages(scale._arguments(["--device", "cuda", "--batch-pixels", "4e6", "8e6", "--repeats", "1"]))
    assert seen == [(k, n, c) for k, c in (("auto", 512), ("plain", 128)) for n in (4_000_000, 8_000_000)]
    printed = capsys.readouterr().out
    for title in ("batch 512, kernels auto, calls of 4 Mpx", "batch 128, kernels plain, calls of 8 Mpx"):
        assert f"on cuda, {title}" in printed
    assert printed.count("images/s") == 4 and "encoding is bound by" in verdict and "targets met" in verdict


def test_stages_on_a_cpu_run():
    work = scale._cpu_stages(get_scheduler(find_model()), DeepSIC(), scale._chunks(None, 64, 2))
    assert {"synthesis", "prior and entropy coder, decode", "encode, end to end"} < work.keys()
    for run in work.values():
        run()


def test_batches_of_each_size_are_timed(monkeypatch):
    monkeypatch.setattr(scale, "BATCHES", (1, 3))
    found = list(scale._by_batch(scale._chunks(None, 64, 2), 1))
    assert [size for size, *_ in found] == [1, 3] and all(rate > 0 for _, *rates in found for rate in rates)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are those of Linux")
def test_memory_of_a_chunk_is_measured(tmp_path, capsys):
    task = {"shape": [90, 70, 1], "dtype": "uint16", "mode": "exact", "payload": str(tmp_path / "payload")}
    scale._code_chunk(task | {"what": "encode"}, None)
    scale._code_chunk(task | {"what": "decode"}, None)
    encoded, decoded = map(json.loads, capsys.readouterr().out.splitlines())
    assert encoded["nbytes"] == decoded["nbytes"] == (tmp_path / "payload").stat().st_size
    assert (encoded["result"], decoded["result"]) == (0, 90 * 70 * 2 / 2**20)
    assert all(one["peak"] >= one["before"] > 0 for one in (encoded, decoded))
    restored = DeepSIC().decode((tmp_path / "payload").read_bytes())
    assert (restored == scale._samples([90, 70, 1], "uint16", None)).all()


def test_chunks_beyond_the_memory_that_is_allowed_are_named(monkeypatch, tmp_path, capsys):
    def in_child(args, way, mode, **task):
        peak = 286 + (12.5 if mode == "exact" else 11.5) * 4000 * 4000 / 2**20
        return {"before": 30.0, "peak": peak, "result": 20.0 * (way == "decode"), "nbytes": 10, "cpu": 1.0}

    monkeypatch.setattr(scale, "_in_child", in_child)
    options = ["--shapes", "4000x4000x3", "--dtypes", "uint16", "--modes", "exact", "wavelets", "features"]
    verdict = scale.chunks(scale._arguments([*options, "--folder", str(tmp_path)]))
    assert verdict.endswith("MISSED; 4000x4000x3 uint16 exact is not")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4000x4000x3")]
    assert len(rows) == 2, "features are for colour of 8 bits"
