"""Every page of the documentation, as a reader would follow it: code runs, commands work, links lead somewhere.

Blocks of a page run in their order, in one folder and one namespace, with the model and images of the package.
`<!-- not run: reason -->` in the line above a block leaves it out; commands in it still have to parse.
"""

import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest

from deepsic_codec.cli.main import build_parser, main
from tests.common import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
MARK = r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?"
BLOCK = re.compile(MARK + r"^```(?P<kind>python|bash)\n(?P<code>.*?)^```$", re.M | re.S)
NEEDS = {"dask.distributed": "distributed", "icechunk": "icechunk", "kerchunk": "kerchunk", "ome_zarr": "ome_zarr"}


def name(path):
    return path.relative_to(DOCS).with_suffix("").as_posix()


def blocks(path):
    return [match.groupdict() for match in BLOCK.finditer(path.read_text())]


def commands(code, start="deepsic "):
    """Arguments of the commands that begin with these words."""
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix(start), comments=True) for line in lines if line.startswith(start)]


RUN = [path for path in PAGES if any(not block["reason"] for block in blocks(path))]


@pytest.fixture
def cloud(monkeypatch):
    """An S3 service on this machine that s3:// URLs go to."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.parametrize("path", RUN, ids=name)
def test_what_a_page_tells_to_do_works(path, tmp_path, monkeypatch, request):
    text = path.read_text()
    for needed, package in NEEDS.items():
        if re.search(rf"^(from|import) {re.escape(needed)}\b", text, re.M):
            pytest.importorskip(package)
    if "s3://" in text:
        request.getfixturevalue("cloud")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(blocks(path)):
        if block["reason"]:
            continue
        if block["kind"] == "python":
            exec(compile(block["code"], f"{name(path)}, block {number}", "exec"), namespace)
        for arguments in commands(block["code"]) if block["kind"] == "bash" else []:
            assert main(arguments) == 0, shlex.join(arguments)
        for arguments in commands(block["code"], "python examples/") if block["kind"] == "bash" else []:
            monkeypatch.setattr("sys.argv", arguments)
            runpy.run_path(str(ROOT / "examples" / arguments[0]), run_name="__main__")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_and_modules_exist(path):
    for block in blocks(path):
        for arguments in commands(block["code"]) if block["kind"] == "bash" else []:
            build_parser().parse_args(arguments)
    for module in re.findall(r"python -m ((?:benchmarks|deepsic_codec)\.[\w.]+)", path.read_text()):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    """The site's own build checks anchors, too; this needs no mkdocs."""
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).resolve().is_file(), target


def test_every_page_is_in_the_menu():
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert {path.relative_to(DOCS).as_posix() for path in PAGES} == listed


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.stem)
def test_code_is_narrow_enough_to_be_read_without_scrolling(path):
    wide = [line for block in blocks(path) for line in block["code"].splitlines() if len(line) > 88]
    assert not wide, "\n".join(wide)


def test_the_menu_has_each_page_once():
    """Two titles of a page, or two pages of a name, send readers in circles."""
    entries = re.findall(r"^\s+- (.+): (.*\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    for names in zip(*entries, strict=True):
        assert len({name.casefold() for name in names}) == len(names)


def test_extras_are_those_of_the_project():
    """One table has them all, and instructions to install name extras that exist (tests/packaging)."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| (`[^|]+?) \|", (DOCS / "index.md").read_text().split("| Extra |")[1].split("\n\n")[0], re.M)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(
        extras.keys() - {"bench", "docs", "test"}
    )


def test_json_in_pages_is_json():
    for path in PAGES:
        for text in re.findall(r"^```json\n(.*?)^```$", path.read_text(), re.M | re.S):
            json.loads(text)


def test_the_helper_finds_blocks():
    found = blocks(DOCS / "howto" / "gpu.md")
    assert [bool(block["reason"]) for block in found] == [False, True]
    assert [block["kind"] for block in found] == ["python", "bash"]
    assert commands("pip x\ndeepsic info 'a b' \\\n  --json\n") == [["info", "a b", "--json"]]


def test_a_page_with_an_error_fails(tmp_path, monkeypatch):
    page = Path(tmp_path) / "page.md"
    page.write_text("```python\nassert False\n```\n")
    (block,) = blocks(page)
    with pytest.raises(AssertionError):
        exec(block["code"])
