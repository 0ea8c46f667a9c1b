"""What the package says of itself: dependencies, layers, versions, and the files that go with it."""

import ast
import re
import sys
import tomllib
from functools import cache

from tests.common import ROOT, run_python

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = ROOT / "deepsic_codec"
MODULES = {
    "llvmlite": "numba",
    "arro3": "arro3-io",
    "google_crc32c": "google-crc32c",
    "PIL": "pillow",
}  # imported by another name than that of the package
EXTRAS = {"distributed": "dask", "botocore": "s3", "pandas": "xarray"}  # come with a package of this extra
GUESTS = {"dask", "pandas", "xarray"}  # checked for, or imported where arrays of these packages come in
COMPILERS = {"llvmlite", "numba"}  # compile kernels where a wheel has none
WITH_TORCH = {"triton"}  # comes with builds for CUDA, and is done without elsewhere


@cache
def imported(path, lazy=True):
    """Names that a module imports, in functions as well if `lazy`, but not for type checkers alone."""
    found, pending = set(), list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += list(ast.iter_child_nodes(node))
    return found


def room(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def requirements(lines):
    return {re.match(r"[\w.-]+", line)[0].lower() for line in lines}


def test_everything_imported_is_declared():
    declared = requirements(PROJECT["dependencies"])
    optional = requirements(line for lines in PROJECT["optional-dependencies"].values() for line in lines)
    for path in PACKAGE.rglob("*.py"):
        for name in imported(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "deepsic_codec":
                continue
            package = MODULES.get(top, top).lower()
            assert package in declared | optional | WITH_TORCH or top in EXTRAS, f"{path.name} imports {top}"


def test_extras():
    """Archives are written and read with the dependencies alone; `all` has what any extra for users has.

    What of a model imports torch is imported where torch is asked for (`test_torch_is_imported_by_networks_alone`).
    """
    declared = requirements(PROJECT["dependencies"])
    for path in PACKAGE.rglob("*.py"):
        if FLOOR.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), 0) <= FLOOR["archive"]:
            guests = GUESTS | ({"torch"} if PACKAGE / "model" in path.parents else set())
            for top in {name.split(".")[0] for name in imported(path)} - WITH_TORCH - COMPILERS - {"deepsic_codec"}:
                package = MODULES.get(top, top)
                assert top in sys.stdlib_module_names or package in declared or top in guests, f"{path} imports {top}"
    extras = PROJECT["optional-dependencies"]
    (line,) = extras["all"]
    assert set(re.search(r"\[(.*)\]", line)[1].split(",")) == extras.keys() - {"all", "bench", "docs", "test"}
    text = "".join(
        path.read_text() for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    )
    named = {name for names in re.findall(r"deepsic-codec\[([\w,]+)\]", text) for name in names.split(",")}
    assert named <= extras.keys()
    assert set(re.findall(r'require\("(\w+)", ', text)) <= extras.keys()


# From the ground up. A module imports its own room and rooms below, nowhere what is above, in functions neither.
LAYERS = (
    "reference errors config axes require _compat progress metrics",
    "kernels",
    "payload",
    "model",
    "codec",
    "stored",
    "labels",
    "bulk",
    "archive",
    "dask xarray",
    "io samples",
    "training",
    "cli",
)
FLOOR = {room: number for number, rooms in enumerate(LAYERS) for room in rooms.split()}


def layer_violations():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if name == "deepsic_codec":
            continue
        for target in sorted(imported(path)):
            top = room(target)
            if top in FLOOR and FLOOR[top] > FLOOR[room(name)]:
                yield name, target


def test_archives_need_no_extra():
    code = """
        import sys
        for name in ("PIL", "rich", "dask", "imagecodecs", "matplotlib", "rasterio", "tifffile", "torch", "xarray"):
            sys.modules[name] = None
        import numpy as np
        import deepsic_codec.codec.encode, deepsic_codec.labels.relabel
        from deepsic_codec import DeepSIC, create_array, open_archive, open_labels
        from deepsic_codec.samples import eurosat_mosaic
        try:
            eurosat_mosaic()
        except ImportError as error:
            print(type(error).__name__, error)
        codec = DeepSIC(transform="features")
        z = create_array("memory://a", name="b", shape=(64, 64, 3), dtype="u1", chunks=(64, 64, 3), codec=codec)
        z[...] = np.arange(64)[:, None, None]
        print(open_archive("memory://a").shape, z[...].shape, open_labels(z, scan=True).where("Forest >= 0").count)
    """
    missing, shapes = run_python(code).splitlines()
    assert missing == "MissingPackage missing package pillow; run pip install 'deepsic-codec[cli]'"
    assert shapes == "(64, 64, 3) (64, 64, 3) 1"


def test_every_module_has_a_layer():
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert names - {"__init__"} == FLOOR.keys()


def test_imports_point_downward():
    upward = set(layer_violations())
    assert not upward, "\n".join(f"{name} imports {target}" for name, target in sorted(upward))


def test_no_module_imports_itself_through_others():
    """Imports inside functions count: they may be late, but hide no circle."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    del paths["deepsic_codec"]  # loads names of all rooms when they are first used
    graph = {
        name: {target if target in paths else target.rpartition(".")[0] for target in imported(path)} & paths.keys()
        for name, path in paths.items()
    }
    while ends := [name for name, targets in graph.items() if not targets]:  # modules that import no others
        graph = {name: targets.difference(ends) for name, targets in graph.items() if name not in ends}
    assert not graph, f"circle of imports: {', '.join(sorted(graph))}"


#: Modules of models that need no torch, neither by themselves nor by what they import at their top.
WITHOUT_TORCH = (
    "architecture batch cpu.dot cpu.layers cpu.prior cpu.scheduler cpu.transforms exact.checks exact.formats "
    "exact.prior_formats exact.tensors families family file logistic paper schedule scheduler tensors threads "
    "vocabulary zoo"
)


def test_torch_is_imported_by_networks_alone():
    for floor in ("payload", "codec", "stored", "labels", "bulk"):
        for path in (PACKAGE / floor).rglob("*.py"):
            assert not [name for name in imported(path) if name.split(".")[0] == "torch"], path
    for name in WITHOUT_TORCH.split():
        pending, visited = [f"deepsic_codec.model.{name}"], set()
        while pending:
            path = ROOT / f"{pending.pop().replace('.', '/')}.py"
            if path in visited or not path.is_file():
                continue
            visited.add(path)
            targets = imported(path, lazy=False)
            assert not [target for target in targets if target.split(".")[0] == "torch"], f"{name} imports {path}"
            pending += [part for target in targets for part in (target, target.rpartition(".")[0])]


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {PROJECT['version']}\n" in citation and f"license: {PROJECT['license']}\n" in citation
    assert f"## {PROJECT['version']} " in (ROOT / "CHANGELOG.md").read_text()


def test_files_that_go_with_it():
    for name in (*PROJECT["license-files"], "deepsic_codec/py.typed", "deepsic_codec/models/base-407b2baf.safetensors"):
        assert (ROOT / name).is_file(), name
    attribution = (PACKAGE / "data" / "ATTRIBUTION.md").read_text()
    for path in (PACKAGE / "data").iterdir():
        assert path.suffix in (".md", ".json") or path.name in attribution, path.name


def test_what_contributors_are_told_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:deepsic_codec|tests|docs|benchmarks|payload|model|codecs)/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file() or (PACKAGE / name).is_file(), name
    drawing = text.split("```text\n")[1].split("```")[0]
    rooms = {name for line in drawing.splitlines() for name in re.split(r"\s{3,}", line)[0].split()}
    assert rooms == FLOOR.keys() - {"_compat"}, "the drawing and LAYERS differ"
    for line in drawing.splitlines():
        for name in re.split(r"\s{3,}", line)[0].split():
            assert list(PACKAGE.glob(f"{name}.py")) or (PACKAGE / name).is_dir() or "*" in name, name
