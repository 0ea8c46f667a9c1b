import re

import pytest

from tests.common import ROOT

TEXT = (ROOT / "docs" / "scale.md").read_text()


def test_code_in_the_document_runs(stub, tmp_path, monkeypatch, capsys):
    pytest.importorskip("dask.array")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    exec(compile(block, "docs/scale.md", "exec"), {})
    first, mean, count = capsys.readouterr().out.splitlines()
    assert first.startswith("12 chunks, ") and first.endswith("survey.zarr/mosaic_labels")
    assert 120 < float(mean) < 135 and count == "0"


def test_commands_in_the_document_parse():
    from deepsic_codec.cli.main import build_parser

    for line in re.findall(r"^    deepsic (.*)$", TEXT, re.M):
        build_parser().parse_args(line.split())
