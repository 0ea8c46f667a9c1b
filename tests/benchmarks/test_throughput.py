"""The speed benchmark measures every codec that it is asked for; how fast they are, no test says."""

import pytest

from benchmarks import throughput
from deepsic_codec import config


def test_efforts_have_rows_of_their_own(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "EDGE", 64)
    monkeypatch.setattr(throughput, "PEER_NAMES", ("JPEG 2000 PSNR",))
    monkeypatch.setattr(throughput, "peak_memory", lambda args: (1.0, 0.5))
    with config.set(threads=1):  # and what the benchmark sets is gone again afterwards
        throughput.main(["--chunks", "2", "--repeats", "1", "--efforts", "0", "3", "--threads", "1"])
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in printed.splitlines() if line.startswith("| ")]
    column = rows[0].index("bpp")
    bpp = {row[0]: float(row[column]) for row in rows[1:]}
    assert bpp["DeepSIC effort 0"] > bpp["DeepSIC"] >= bpp["DeepSIC effort 3"] - 0.1
    assert list(bpp)[3:] == ["JPEG 2000 PSNR", "Blosc-Zstd"]


def test_scene_smaller_than_a_chunk_is_refused():
    from deepsic_codec.samples import drone_frame

    with pytest.raises(ValueError, match="at least 512x512"):
        throughput.cut(drone_frame()[:500])
