import contextlib
import io
import re
import shlex
import sys
import warnings

import numpy as np
import pytest
import zarr
from PIL import Image

from deepsic_codec import create_array
from deepsic_codec.cli import console
from deepsic_codec.cli.console import say, say_json, say_table
from deepsic_codec.cli.main import COMMANDS, build_parser, main
from deepsic_codec.cli.options import with_options
from deepsic_codec.errors import ConfigurationError, counted
from deepsic_codec.metrics import psnr
from deepsic_codec.samples import LANDSAT_BANDS, drone_frame, eurosat_classes, eurosat_mosaic, landsat_scene
from tests.common import check_lazy, photograph, run_python

METADATA = {"zarr.json", ".zarray", ".zattrs", ".zgroup"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["demo", "--format", "4"],
        ["demo", "--quality", "200.1"],
        ["demo", "--quality", "good"],
        ["ingest", "a", "b", "--chunk", "0"],
    ],
)
def test_misuse_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("deepsic")


def test_failure_is_one_line_and_a_traceback_only_with_debug(tmp_path, capsys):
    occupied = tmp_path / "file"
    occupied.touch()
    assert main(["demo", "--out", str(occupied)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"deepsic demo: error: {occupied}: file exists"
    with pytest.raises(FileExistsError):
        main(["--debug", "demo", "--out", str(occupied)])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Folder and output of `deepsic demo`."""
    folder = tmp_path_factory.mktemp("demo")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["demo", "--out", str(folder)]) == 0
    return folder, output.getvalue()


def test_demo_stores_what_it_prints(demo):
    folder, printed = demo
    for name, image in {"mosaic": eurosat_mosaic(), "drone": drone_frame()}.items():
        array = zarr.open(folder / "demo.zarr" / name, mode="r")
        assert array.metadata.zarr_format == 3
        files = [f for f in (folder / "demo.zarr" / name).rglob("*") if f.is_file() and f.name not in METADATA]
        stored = sum(f.stat().st_size for f in files)
        assert len(files) == 12 and stored < image.nbytes / 8
        (row,) = [line for line in printed.splitlines() if f"{image.nbytes:,}" in line]
        assert name in row and f"{stored:,}" in row and f"{psnr(image, array[:]):.2f}" in row
    with Image.open(folder / "before-after.png") as picture:
        assert picture.width > 1400 and len(np.unique(np.asarray(picture)[::8, ::8])) > 100


def test_demo_finds_most_labels_and_answers_its_query_from_headers(demo):
    _, printed = demo
    (agreeing,) = re.findall(r"true classes on (\d+) of 192 tiles", printed)
    assert int(agreeing) > 0.7 * 192
    (read,) = re.findall(r"Found by reading ([\d,]+) bytes", printed)
    assert int(read.replace(",", "")) <= 12 * 256 + 3000  # and metadata
    found, water = (
        {w for w in line.split() if w[0].isdigit() and "." in w}
        for line in printed.splitlines()
        if line.strip().startswith(("labels:", "true classes:"))
    )
    assert water == {
        f"{r // 4}.{c // 4}"
        for r, row in enumerate(eurosat_classes())
        for c, name in enumerate(row)
        if name in ("River", "SeaLake")
    }
    assert len(found & water) >= len(water) - 1 and len(found) < 12


def test_demo_stores_a_scene_of_several_bands_with_its_index(demo):
    folder, printed = demo
    array, scene = zarr.open(folder / "demo.zarr" / "landsat", mode="r"), landsat_scene()
    assert scene.shape == (169, 186, len(LANDSAT_BANDS)) and scene.dtype == "u2" and 5000 < scene.min() < scene.max()
    assert array.metadata.zarr_format == 3 and array.attrs["crs"] == "EPSG:32617"
    error = np.sqrt(np.square(array[...].astype("f8") - scene).mean())
    assert 70 < error < 77 and f"RMS error {error:.1f} digital numbers" in printed
    assert all((folder / "demo.zarr" / f"{name}_labels").is_dir() for name in ("mosaic", "drone", "landsat"))


def test_demo_ends_with_commands_that_work(demo, monkeypatch, tmp_path):
    _, printed = demo
    _, commands = printed.split("Try next:\n")
    monkeypatch.chdir(tmp_path)
    assert [main(shlex.split(line)[1:]) for line in commands.splitlines()] == [0, 0, 0]


def test_commands_work_without_rich(demo):
    """On a terminal: plain text, and no bar."""
    folder, _ = demo
    code = f"""
        import sys
        sys.modules["rich"] = None
        sys.stderr.isatty = lambda: True
        from deepsic_codec.cli import console
        console.find_spec = lambda name: None
        from deepsic_codec.cli.main import main
        for command in ("index", "info"):
            assert main([command, {str(folder / "demo.zarr")!r}]) == 0
        assert main(["labels", {str(folder / "demo.zarr")!r}, "--name", "mosaic"]) == 0
    """
    printed = run_python(code)
    assert "12 chunks: 12 labelled in their headers" in printed and "River" in printed and "12 of 12 stored" in printed


def test_help_imports_next_to_nothing():
    code = """
        from deepsic_codec.cli.main import main
        try:
            main(["--help"])
        except SystemExit:
            pass
    """
    check_lazy(code, unwanted=("torch", "zarr", "numpy", "rich", "PIL"))


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_help_of_a_command_imports_nothing_large(command):
    code = f"""
        from deepsic_codec.cli.main import main
        try:
            main([{command!r}, "--help"])
        except SystemExit:
            pass
    """
    check_lazy(code, unwanted=("torch", "zarr", "rich", "PIL", "dask", "imagecodecs", "matplotlib"))


def test_one_is_not_counted_as_several(stub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_array("a.zarr", name="a", data=photograph(64, 64, 3))
    for line in (
        "index a.zarr",
        "labels a.zarr --scan",
        "query a.zarr 'Bright | ~Bright' --export b",
        "export a.zarr d.tif",
        "preview a.zarr",
        "info a.zarr",
    ):
        assert main(shlex.split(line)) == 0
    printed = "".join(capsys.readouterr())
    assert "1 of 1 chunk;" in printed and "1 image:" in printed
    assert not re.findall(r"(?<![\d.,x])\b1 (?!bits|is\b)[a-z]+s\b", printed)
    assert [counted(n, "class", "classes") for n in (0, 1, 1234)] == ["0 classes", "1 class", "1,234 classes"]


def test_control_characters_are_escaped(capsys):
    say("a\x1b[31mb\r\nc")
    say_table(["name", "n"], [["\x07", "1"]])
    say("d\n")
    assert capsys.readouterr().out == "a\\x1b[31mb\\r\\nc\nname  n\n\\x07  1\nd\n\n"


def test_warnings_and_tracebacks_have_no_control_characters(capsys, monkeypatch, tmp_path):
    def run(args):
        warnings.warn("\x1b[2J; see scan=True and index=3", stacklevel=1)
        raise ValueError("\x1b[3J")

    monkeypatch.setattr("deepsic_codec.cli.inspect.run_info", run)
    monkeypatch.setattr("sys.excepthook", sys.__excepthook__)
    with pytest.raises(ValueError) as caught:
        main(["--debug", "info", "x"])
    sys.excepthook(ValueError, caught.value, None)
    # pytest records warnings; they are printed again as Python does without it.
    monkeypatch.setattr("warnings.showwarning", lambda *args: sys.stderr.write(warnings.formatwarning(*args[:4])))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["info", "x"]) == 1
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\\x1b[3J" in err
    assert "deepsic info: warning: \\x1b[2J; see scan=True and --index 3\n" in err


def test_json_has_null_for_what_is_no_number(capsys):
    say_json({"a": [float("nan"), 1.5], "b": (float("inf"), "NaN")})
    assert capsys.readouterr().out == '{"a": [null, 1.5], "b": [null, "NaN"]}\n'


def test_tables_are_aligned(capsys):
    say_table(["name", "bytes", "labels"], [["a", "1,234", "x"], ["longer", "5", "yy"]], left=["labels"])
    assert capsys.readouterr().out == "name    bytes  labels\na       1,234  x\nlonger      5  yy\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_moves_on_a_terminal_alone(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with console.progress_bar("files") as progress:
        progress(3, 7)
    assert not sys.stderr.getvalue()
    monkeypatch.setattr("sys.stderr", Terminal())
    with console.progress_bar("fi[les]") as progress:
        progress(3, 7)
    assert "fi[les]" in sys.stderr.getvalue() and "3/7" in sys.stderr.getvalue()


@pytest.mark.parametrize(
    ("arguments", "extra"), [("demo", "cli"), ("preview x.zarr", "cli"), ("compare x.png", "compare")]
)
def test_commands_that_draw_name_the_extra_that_they_need(arguments, extra, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deepsic_codec.require.find_spec", lambda name: None)
    assert main(arguments.split()) == 1
    assert f"pip install 'deepsic-codec[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["train", "--data", "x"], ["evaluate", "x.png"]], ids=str)
def test_commands_that_need_torch_name_its_extra(arguments, monkeypatch, capsys):
    monkeypatch.setattr("deepsic_codec.require.find_spec", lambda name: None)
    assert main(arguments) == 1
    assert "missing package torch; run pip install 'deepsic-codec[train]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_that_parse_and_can_be_quiet(command, capsys):
    parser = build_parser()
    assert COMMANDS[command].examples
    for line in COMMANDS[command].examples:
        program, *arguments = shlex.split(line)
        args = parser.parse_args([*arguments, "-q"])
        assert program == "deepsic" and args.command == command and args.quiet
    with pytest.raises(SystemExit):
        parser.parse_args([command, "--help"])
    assert COMMANDS[command].examples[-1] in capsys.readouterr().out


def test_quiet_prints_errors_and_json_alone(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())

    def run(args):
        (say_json({"a": 1}) if args.json else say("result"))
        with console.progress_bar("work") as progress:
            progress(1, 2)
        raise ConfigurationError("no such thing")

    monkeypatch.setattr("deepsic_codec.cli.inspect.run_info", run)
    assert main(["info", "x", "-q"]) == 2 and capsys.readouterr().out == ""
    assert main(["info", "x", "-q", "--json"]) == 2 and capsys.readouterr().out == '{"a": 1}\n'
    assert sys.stderr.getvalue() == 2 * "deepsic info: error: no such thing\n"
    assert main(["info", "x"]) == 2 and "result" in capsys.readouterr().out and "work" in sys.stderr.getvalue()


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("demmo", "did you mean demo?"),
        ("demo --qualty 3", "did you mean --quality?"),
        ("ingest a b --efort 2", "did you mean --effort"),
        ("compare a --tune ms_ssim", "did you mean ms-ssim?"),
    ],
)
def test_misspelt_words_of_the_command_line(line, hint, capsys):
    with pytest.raises(SystemExit):
        main(line.split())
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "command", "printed"),
    [
        ("quality and rmse: pass only one of them", "ingest", "--quality and --rmse: pass only one of them"),
        ("pass value_range=(low, high), or rmse= alone", "ingest", "pass --value-range low,high, or --rmse alone"),
        ("use transform='wavelet'", "ingest", "use --transform wavelet"),
        ("it needs max_error", "ingest", "it needs --max-error"),
        ("DeepSIC(max_error=0) is lossless", "ingest", "--max-error 0 is lossless"),
        ("overwrite=True or zarr_format=2", "export", "--overwrite or --format 2"),
        ("open_labels(array, scan=True)", "query", "--scan"),
        ("s3://a/b?scan=1: no scan=here/x_y", "info", "s3://a/b?scan=1: no scan=here/x_y"),
        ("index: is not there", "query", "--index: is not there"),
        ("use transform='wavelet'", "info", "use transform='wavelet'"),
        ("pass resume=True, region=... for a part, or overwrite=True", "ingest", "pass --resume, or --overwrite"),
    ],
)
def test_errors_name_options_of_the_command(message, command, printed):
    positional = {"query": ["x", "y"], "info": ["x"]}.get(command, ["x", "y"])
    assert with_options(message, build_parser().parse_args([command, *positional]).options) == printed


def test_an_error_of_a_codec_names_options(tmp_path, capsys):
    Image.fromarray(np.zeros((64, 64, 3), "u1")).save(tmp_path / "a.png")
    assert main(["ingest", str(tmp_path / "a.png"), str(tmp_path / "b.zarr"), "--quality", "9", "--rmse", "2"]) == 2
    assert "error: --quality and --rmse: " in capsys.readouterr().err
