"""The page of figures: what benchmarks print becomes Markdown, and nothing of the machine but its name gets onto it."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import report

PRINTED = """Some processor, 2 cores
7 images in IMAGES

| codec | dB |
|-------|----|
| WebP  | 31 |
Conclusion: one < two.

## part

columns   are    kept
1         2      3
"""


def test_markdown():
    page = report.markdown(PRINTED).split("\n\n")
    assert page == [
        "Some processor, 2 cores\n7 images in IMAGES",
        "| codec | dB |\n|-------|----|\n| WebP  | 31 |",
        "Conclusion: one &lt; two.",
        "### part",
        "```text\ncolumns   are    kept\n1         2      3\n```",
    ]


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Commands that would be run; the part `rd` draws its plot, `query` fails."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if "benchmarks.rd" in command:
            Path(command[command.index("--png") + 1]).write_bytes(b"png")
        failed = "benchmarks.query" in command
        return SimpleNamespace(returncode=int(failed), stdout=f"read {command[-1]}\n", stderr="Error: no such thing\n")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_page(ran, tmp_path, capsys):
    out = tmp_path / "out"
    assert report.main(["--quick", "--out", str(out), "--scenes", str(tmp_path)]) == 1
    page = (out / "benchmarks.md").read_text()
    assert len(ran) == len(report.PARTS) and str(tmp_path) not in page and "/tmp" not in page
    assert "![Rate and distortion](benchmarks-rate-distortion.png)" in page
    assert "This part failed: Error: no such thing" in page and "Images and tiles are those that come" in page
    assert "python -m benchmarks.imagery --scenes SCENES" in page and "**A quick run**" in page
    assert "query ..." in capsys.readouterr().out


def test_what_is_not_given_is_left_out_or_bundled(ran, tmp_path):
    images = tmp_path / "mine"
    arguments = ["--quick", "--out", str(tmp_path), "--images", str(images), "--parts", "rd", "entropy", "imagery"]
    assert report.main(arguments) == 0
    assert len(ran) == 2 and all(str(images) in command for command in ran)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "Left out: needs --scenes." in page and str(images) not in page
    assert "Tiles are those" in page


def test_bundled_images(tmp_path):
    places = report._bundled(tmp_path, ["IMAGES", "TILES"])
    assert len(list(Path(places["IMAGES"]).glob("*.png"))) == 4
    assert len(list(Path(places["TILES"]).glob("*/*.jpg"))) == 192 and len(list(Path(places["TILES"]).iterdir())) == 10


def test_every_part_is_a_benchmark():
    for name in report.PARTS:
        assert (report.ROOT / "benchmarks" / f"{name}.py").is_file(), name
