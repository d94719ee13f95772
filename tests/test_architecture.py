"""The rooms of the package: who may import whom, what is public, and how long files and functions may be.

Reads the sources, except for the last two tests, which import rooms with heavy packages blocked.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "crosslmm_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
PERF = sorted(ROOT.glob("perf/**/*.py"))
SOURCES = sorted([*MODULES, *PERF, *ROOT.glob("tests/**/*.py"), *ROOT.glob("configs/*.py")])

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
MAX_PARAMETERS = 12
MAX_ENTRIES = 16  # of a folder below the package's top level
MANY_ENTRIES = {"crosslmm_jax/data/annotations/formats"}  # one file per format
MAX_ANY = 60  # lines of the package that say `Any`, imports aside

# room -> rooms that it may import, beside itself. "base" is errors, config, config_io, presets and batch.
BASE = {"errors", "config", "config_io", "presets", "batch"}
DATA = {f"data.{name}" for name in ("text", "media", "annotations", "index", "batching", "loading")}
DATA |= {"data", "data.tfds_export", "data.reports"}
LIBRARY = {"base", "utils", "parallel"}
ALLOWED: dict[str, set[str]] = {
    "base": set(),
    "utils": {"base"},
    "model": {"base"},
    "parallel": {"base", "utils"},
    "model_folder": LIBRARY | {"model"},
    "data": {"base", *DATA},
    "data.text": {"base", "utils"},
    "data.media": {"base", "utils"},
    "data.annotations": {"base", "utils", "data.text", "data.media"},
    "data.index": {"base", "utils", "data.text", "data.media", "data.annotations"},
    "data.batching": {"base", "utils", "data.text", "data.media", "data.annotations", "data.index"},
    "data.tfds_export": {"base", "utils", "data.text", "data.media", "data.annotations", "data.index"},
    "data.loading": {"base", "utils", *DATA} - {"data", "data.reports"},
    "data.reports": {"base", "utils", *DATA} - {"data"},
    "convert": LIBRARY | {"model", "model_folder"},
    "train": LIBRARY | {"model", "model_folder"} | DATA,
    "inference": LIBRARY | {"model", "model_folder"} | DATA,
    "profiling": LIBRARY | {"model", "train", "inference"} | DATA,
    "package": {"inference", "parallel"},  # `crosslmm_jax.load`, and only when it is asked for
}
ALLOWED["demo"] = {room for allowed in ALLOWED.values() for room in allowed} | set(ALLOWED)
ALLOWED["cli"] = ALLOWED["demo"] | {"demo"}
# Packages that take seconds to import, or that a machine may lack.
HEAVY = {"av", "grain", "tensorflow_datasets", "tyro", "torch", "transformers", "matplotlib"}
MAY_IMPORT_AT_TOP = {"data": {"av", "grain"}, "cli": set()}
# A single file of PyTorch that `crosslmm convert to-hf --torch-reference` copies into exports. Nothing here
# imports it, which a test below sees to, so it may import at its top what the package must do without.
STANDS_ALONE = PACKAGE / "convert" / "torch_reference.py"
OPTIONAL = {
    "torch",
    "pillow_heif",
    "wandb",
}  # needed by some commands or files only; a message says what to install
# Arrays in, arrays out: these work where nothing that reads files is installed.
ARRAY_MODULES = ("model", "parallel", "train.step", "profiling.params", "profiling.tasks.prefill")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


TREES = {path: parse(path) for path in SOURCES}


def room_of(module: str) -> str:
    """Room of a dotted module name; "package" for `crosslmm_jax` itself."""
    parts = module.split(".")[1:]
    if not parts:
        return "package"
    if parts[0] in BASE:
        return "base"
    return ".".join(parts[:2]) if parts[0] == "data" else parts[0]


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(path: Path, tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name or None) of all that `tree`, of the file `path`, imports, relative names resolved.

    `from package import module` counts as an import of the module.
    """
    package = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                ours = module.startswith("crosslmm_jax") and is_module(inner)
                yield (inner, None) if ours else (module, alias.name)


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def run_on_import(tree: ast.Module) -> ast.Module:
    """`tree` without what an import of the file does not run: bodies of functions, type-checking blocks."""

    class Remover(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if is_type_checking(node) else self.generic_visit(node)

    return Remover().visit(ast.parse(ast.unparse(tree)))


def forbidden_arrows(path: Path, tree: ast.Module) -> list[str]:
    room = room_of(dotted(path))
    ours = {name for name, _ in imports_of(path, tree) if name.split(".")[0] == "crosslmm_jax"}
    allowed = ALLOWED[room] | {room}
    return [f"{dotted(path)} -> {name}" for name in sorted(ours) if room_of(name) not in allowed]


def test_arrows_between_rooms() -> None:
    rooms = {room_of(dotted(path)) for path in MODULES}
    assert rooms <= set(ALLOWED), "a new room: give it a row in ALLOWED"
    assert [arrow for path in MODULES for arrow in forbidden_arrows(path, TREES[path])] == []
    outside = ("perf", "studies", "tests", "configs")
    upward = [
        f"{dotted(path)} -> {name}"
        for path in MODULES
        for name, _ in imports_of(path, TREES[path])
        if name.split(".")[0] in outside
    ]
    assert upward == []


def test_no_circle_between_files() -> None:
    """Of imports that run when a file is imported; of packages, the names taken from them."""
    graph = {}
    for path in MODULES:
        named = imports_of(path, run_on_import(TREES[path]))
        ours = {name for name, _ in named if name.startswith("crosslmm_jax.") and name != dotted(path)}
        graph[dotted(path)] = ours
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"files import each other in a circle: {error.args[1]}")


def public_names(package: str) -> set[str]:
    """`__all__` of a package."""
    tree = TREES[ROOT / package.replace(".", "/") / "__init__.py"]
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_rooms_are_entered_by_their_door() -> None:
    """What a room takes from another comes from that room's package, which lists it in `__all__`."""
    wrong = []
    for path in MODULES:
        room = room_of(dotted(path))
        for module, name in imports_of(path, TREES[path]):
            other = room_of(module)
            if not module.startswith("crosslmm_jax.") or other in (room, "base", "package"):
                continue
            door = f"crosslmm_jax.{other}"
            public = public_names(door)
            if name is None:
                ok = module == door or module.removeprefix(f"{door}.") in public
            else:
                ok = module == door and name in public
            if not ok:
                wrong.append(f"{dotted(path)} -> {module}{f':{name}' if name else ''}")
    assert wrong == []


def test_packages_name_what_is_public() -> None:
    for path in MODULES:
        if path.name == "__init__.py":
            names = public_names(dotted(path))
            assert names, f"{path}: no __all__"
            assert "TODO" not in (ast.get_docstring(TREES[path]) or "TODO"), path


def test_flax_stays_in_the_model() -> None:
    for path in MODULES:
        if room_of(dotted(path)) != "model":
            flax = {name for name, _ in imports_of(path, TREES[path]) if name.split(".")[0] == "flax"}
            assert flax <= {"flax.struct"}, path


def test_data_and_batch_know_no_jax() -> None:
    for path in MODULES:
        if room_of(dotted(path)).startswith("data") or dotted(path) == "crosslmm_jax.batch":
            names = {name.split(".")[0] for name, _ in imports_of(path, TREES[path])}
            assert not names & {"jax", "flax", "optax"}, path


def test_heavy_packages_are_imported_late() -> None:
    for path in MODULES:
        room = room_of(dotted(path)).split(".")[0]
        late = HEAVY - MAY_IMPORT_AT_TOP.get(room, set())
        late -= {"torch"} if path == STANDS_ALONE else set()
        early = {name.split(".")[0] for name, _ in imports_of(path, run_on_import(TREES[path]))}
        assert early & late == set(), path
        if room in {"base", "cli", "package", "utils"}:
            assert "jax" not in early, f"{path}: `crosslmm --help` must answer without starting jax"


def test_every_package_that_is_imported_is_declared() -> None:
    """What is imported anywhere is a dependency, or comes with the one that needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[\[<>=;]", line)[0].lower().replace("-", "_") for line in project["dependencies"]}
    distribution = {"PIL": "pillow", "yaml": "pyyaml", "orbax": "orbax_checkpoint"}
    brought = {
        "absl": "grain",
        "google": "tensorflow_datasets",
        "numpy": "numpy",
        "jaxlib": "jax",
    }
    imported = {name.split(".")[0] for path in MODULES for name, _ in imports_of(path, TREES[path])}
    imported -= sys.stdlib_module_names | {"crosslmm_jax"}
    names = {distribution.get(name, brought.get(name, name)).lower() for name in imported}
    assert names - declared - OPTIONAL == set()


def test_the_torch_module_is_data() -> None:
    """Exports carry it to where this package is not: it imports nothing of ours, and nothing imports it."""
    own = {name.split(".")[0] for name, _ in imports_of(STANDS_ALONE, TREES[STANDS_ALONE])}
    assert own - sys.stdlib_module_names == {"torch", "safetensors"}
    for path in MODULES:
        assert dotted(STANDS_ALONE) not in {name for name, _ in imports_of(path, TREES[path])}


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_and_functions_are_short_and_say_what_they_are_for() -> None:
    for path in SOURCES:
        tree = TREES[path]
        assert ast.get_docstring(tree), f"{path}: a module says in its first line what it is for"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES, path
        for node in functions_of(tree):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, f"{path}: {node.name}"


def test_functions_have_few_parameters_and_types() -> None:
    """Of functions and methods; a function inside a function has its types in plain sight."""
    for path in MODULES:
        tree = TREES[path]
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(statement for cls in classes for statement in cls.body)]:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
                assert len(named) <= MAX_PARAMETERS, f"{path}: {node.name} takes {len(named)} parameters"
                bare = [argument.arg for argument in named if argument.annotation is None]
                assert bare == [], f"{path}: {node.name}"


def test_few_values_are_of_any_type() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in MODULES).splitlines()
    lines = [line for line in text if re.search(r"\bAny\b", line) and "import" not in line.split()[:3]]
    assert len(lines) <= MAX_ANY


def test_folders_are_small() -> None:
    for folder in (path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__"):
        if str(folder.relative_to(ROOT)) not in MANY_ENTRIES:
            entries = [entry.name for entry in folder.iterdir() if entry.name != "__pycache__"]
            assert len(entries) <= MAX_ENTRIES, f"{folder}: {sorted(entries)}"


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("model/x.py", "from crosslmm_jax.data import reader", 1),
        ("model/x.py", "def f():\n    import crosslmm_jax.train.loop", 1),
        ("model/x.py", "from crosslmm_jax.utils import map_in_order", 1),
        ("data/media/x.py", "from ...model import ops", 1),
        ("data/media/x.py", "from . import video\nfrom crosslmm_jax.errors import UserError", 0),
        ("data/media/x.py", "from crosslmm_jax.data.annotations import Row", 1),
        ("data/reports/x.py", "from crosslmm_jax.data.loading import Dataset", 0),
        ("data/loading/x.py", "from crosslmm_jax.data.reports import describe", 1),
        ("config_io.py", "from crosslmm_jax import load", 1),
        ("train/x.py", "from crosslmm_jax import data, model", 0),
        ("train/x.py", "from crosslmm_jax.convert import verify", 1),
        ("inference/x.py", "from crosslmm_jax import train", 1),
    ],
)
def test_the_arrow_test_finds_what_it_should(module: str, source: str, wrong: int) -> None:
    assert len(forbidden_arrows(PACKAGE / module, ast.parse(source))) == wrong


@pytest.mark.slow
def test_rooms_on_arrays_need_no_reader_of_files() -> None:
    """The imports of imports count too, so this one runs them, with those packages out of reach."""
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(HEAVY))
    modules = ", ".join(f"crosslmm_jax.{name}" for name in ARRAY_MODULES)
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; {blocked}; import {modules}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_the_command_and_the_flags_start_without_jax() -> None:
    program = (
        "import sys; sys.modules['jax'] = None; import crosslmm_jax.cli, crosslmm_jax.parallel.xla_flags"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
