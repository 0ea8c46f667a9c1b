"""Networks in ONNX give the integers of this package, in operators that are exact."""

from dataclasses import replace

import pytest

from deepsic_codec.cli.main import main
from deepsic_codec.errors import ConfigurationError, ModelMismatch
from deepsic_codec.io import onnx_export
from deepsic_codec.model.file import load_arrays, save_model
from deepsic_codec.model.paper import PaperArchitecture
from deepsic_codec.model.zoo import find_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

#: Integers, and float32 where results are exact: no operator that rounds as a runtime likes.
OPERATORS = (
    "Abs Add Cast Clip Concat Conv DepthToSpace Div Floor Gather MatMulInteger Mod Mul Pad ReduceMax ReduceProd "
    "ReduceSum Relu Reshape Round Shape Sign Slice SpaceToDepth Sub Tile Transpose"
)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model with residual blocks at 1/16 of the resolution in its analysis, and its files."""
    base, folder = find_model("base"), tmp_path_factory.mktemp("other")
    arrays = load_arrays(base)
    block, blocks8 = "decoder.synthesis.blocks16.0.", base.architecture["analysis_blocks"][0]
    arrays |= {
        name.replace("decoder.synthesis", "encoder.analysis"): values
        for name, values in arrays.items()
        if name.startswith(block)
    }
    architecture = base.architecture | {"analysis_blocks": [blocks8, 1]}
    info = save_model(folder / "other.safetensors", "other", arrays, architecture, base.vocabulary, {})
    onnx_export.export(info, folder)
    return info, folder


def test_the_command_writes_and_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_export, "CHECKED_SHAPES", ((1, 3, 5),))
    monkeypatch.setattr(onnx_export, "CHECKED_QUALITIES", (100, 8049))
    assert main(["export-model", "--onnx", str(tmp_path / "new" / "folder")]) == 0
    *lines, count = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].rpartition("/")[2] for line in lines] == list(onnx_export.FILES)
    assert int(count.split()[0].replace(",", "")) > 100_000
    for name in onnx_export.FILES:
        model = onnx.load(tmp_path / "new" / "folder" / name)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
        assert {node.op_type for node in model.graph.node} <= set(OPERATORS.split())
        properties = {entry.key: entry.value for entry in model.metadata_props}
        assert properties["decoder"] == find_model("base").decoder
        assert properties["classes"].endswith(",unknown") and properties["classes"].count(",") == 10


def test_other_architectures(other, monkeypatch):
    monkeypatch.setattr(onnx_export, "CHECKED_SHAPES", ((2, 2, 4),))
    monkeypatch.setattr(onnx_export, "CHECKED_QUALITIES", (3350,))
    assert onnx_export.check(*other) > 10_000


def test_other_integers_are_refused(other, monkeypatch):
    monkeypatch.setattr(onnx_export, "CHECKED_QUALITIES", (5000,))
    with pytest.raises(ModelMismatch, match=r"analysis.onnx: symbols differ"):
        onnx_export.check(find_model("base"), other[1])


def test_networks_in_floating_point_are_refused(tmp_path, monkeypatch):
    arch = PaperArchitecture(1.0, (4, 2, 1, 1), filters=4, head_width=4, classes=4)
    monkeypatch.setattr(onnx_export, "load_checked", lambda info: (arch, {}))
    with pytest.raises(ConfigurationError, match="only models of the family 'deepsic'"):
        onnx_export.export(replace(find_model("base"), name="paper"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
