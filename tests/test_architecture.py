"""The rooms of the package: who may import whom, and how long a file or a function may be.

Reads the sources, except for the last test, which imports rooms with heavy packages blocked.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "crosslmm_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(MODULES + [*ROOT.glob("tests/**/*.py"), *ROOT.glob("configs/*.py")])

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

CONFIG_FILES = {"config", "config_io", "presets", "errors", "xla_flags"}
ROOMS = {
    "config", "model", "parallel", "data", "convert", "train", "inference", "evaluation", "profiling", "demo",
    "cli", "package",
}  # fmt: skip
ALLOWED = {
    "config": set(),
    "model": {"config"},
    "parallel": {"config"},
    "data": {"config"},
    "convert": {"config", "model", "parallel"},
    "train": {"config", "model", "parallel", "data", "convert"},
    "inference": {"config", "model", "parallel", "data", "convert"},
    "evaluation": {"config", "data", "inference"},
    "profiling": {"config", "model", "parallel", "train", "inference"},
    "demo": ROOMS - {"cli"},
    "cli": ROOMS,
    "package": {"inference"},  # `crosslmm_jax.load`, and only when it is asked for
}
# Packages that take seconds to import, or that a machine may lack.
HEAVY = {"av", "grain", "tensorflow_datasets", "tyro", "torch", "transformers", "matplotlib"}
MAY_IMPORT_AT_TOP = {"data": {"av", "grain"}}
# A single file of PyTorch that `crosslmm convert to-hf --torch-reference` copies into exports. Nothing here
# imports it, which a test below sees to, so it may import at its top what the package must do without.
STANDS_ALONE = PACKAGE / "convert" / "torch_reference.py"
# Needed by some commands only, and asked for with the extra that brings it: no dependency.
OPTIONAL = {"torch", "decord", "cv2"}
# Arrays in, arrays out: these work where nothing that reads files is installed.
ARRAY_MODULES = ("model", "parallel", "train.step", "profiling.params")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(module: str) -> str:
    """Room of a dotted module name below `crosslmm_jax`; "package" for `crosslmm_jax` itself."""
    parts = module.split(".")[1:]
    if not parts:
        return "package"
    return "config" if parts[0] in CONFIG_FILES else parts[0]


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that `tree`, of the file `path`, imports, relative names resolved."""
    package = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "crosslmm_jax":  # `from crosslmm_jax import demo` means the room
                for alias in node.names:
                    is_room = (PACKAGE / alias.name).is_dir() or (PACKAGE / f"{alias.name}.py").is_file()
                    yield f"{module}.{alias.name}" if is_room else module
            else:
                yield module


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

    return Remover().visit(tree)


def forbidden_arrows(path: Path, tree: ast.Module) -> list[str]:
    room = room_of(dotted(path))
    ours = (name for name in imports_of(path, tree) if name.split(".")[0] == "crosslmm_jax")
    allowed = ALLOWED[room] | {room}
    return [f"{dotted(path)} -> {name}" for name in ours if room_of(name) not in allowed]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_arrows_between_rooms(path: Path) -> None:
    assert room_of(dotted(path)) in ROOMS, "a new room: give it a row in ALLOWED"
    assert forbidden_arrows(path, parse(path)) == []


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_flax_stays_in_the_model(path: Path) -> None:
    flax = [name for name in imports_of(path, parse(path)) if name.split(".")[0] == "flax"]
    if room_of(dotted(path)) != "model":
        assert [name for name in flax if name != "flax.struct"] == []


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_heavy_packages_are_imported_late(path: Path) -> None:
    late = HEAVY - MAY_IMPORT_AT_TOP.get(room_of(dotted(path)), set())
    late -= {"torch"} if path == STANDS_ALONE else set()
    early = {name.split(".")[0] for name in imports_of(path, run_on_import(parse(path)))}
    assert early & late == set()
    if room_of(dotted(path)) in {"config", "cli", "package"}:
        assert "jax" not in early, "`crosslmm --help` must answer without starting jax"


def test_every_package_that_is_imported_is_declared() -> None:
    """What is imported anywhere is a dependency, or comes with the one that needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[\[<>=;]", line)[0].lower().replace("-", "_") for line in project["dependencies"]}
    distribution = {"PIL": "pillow", "yaml": "pyyaml", "orbax": "orbax_checkpoint"}
    brought = {
        "absl": "grain",
        "google": "tensorflow_datasets",
        "tokenizers": "transformers",
        "numpy": "numpy",
        "jaxlib": "jax",
    }
    imported = {name.split(".")[0] for path in MODULES for name in imports_of(path, parse(path))}
    imported -= sys.stdlib_module_names | {"crosslmm_jax"}
    names = {distribution.get(name, brought.get(name, name)).lower() for name in imported}
    assert names - declared - OPTIONAL == set()


def test_the_torch_module_is_data() -> None:
    """Exports carry it to where this package is not: it imports nothing of ours, and nothing imports it."""
    own = {name.split(".")[0] for name in imports_of(STANDS_ALONE, parse(STANDS_ALONE))}
    assert own - sys.stdlib_module_names == {"torch", "safetensors"}
    for path in MODULES:
        assert dotted(STANDS_ALONE) not in imports_of(path, parse(path))
        names = [node.name for node in ast.walk(parse(path)) if isinstance(node, ast.alias)]
        assert STANDS_ALONE.stem not in names


def functions_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_size_and_docstring(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree), "a module says in its first line what it is for"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    assert {name: lines for name, lines in functions_of(tree) if lines > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_argument_is_annotated(path: Path) -> None:
    """Of functions and methods; a function inside a function has its types in plain sight."""
    tree = parse(path)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bare = []
    for node in [*tree.body, *(statement for cls in classes for statement in cls.body)]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
            bare += [f"{node.name}({argument.arg})" for argument in named if argument.annotation is None]
    assert bare == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("model/x.py", "from crosslmm_jax.data import reader", 1),
        ("model/x.py", "def f():\n    import crosslmm_jax.train.loop", 1),
        ("data/x.py", "from ..model import ops", 1),
        ("data/x.py", "from . import sampling\nfrom crosslmm_jax.errors import UserError", 0),
        ("config_io.py", "from crosslmm_jax import load", 1),
        ("train/x.py", "from crosslmm_jax import data, model", 0),
        ("inference/x.py", "from crosslmm_jax import train", 1),
    ],
)
def test_the_arrow_test_finds_what_it_should(module: str, source: str, wrong: int) -> None:
    assert len(forbidden_arrows(PACKAGE / module, ast.parse(source))) == wrong


def test_rooms_on_arrays_need_no_reader_of_files() -> None:
    """The imports of imports count too, so this one runs them, with those packages out of reach."""
    present = [name for name in ARRAY_MODULES if list(PACKAGE.glob(f"{name.replace('.', '/')}*"))]
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(HEAVY))
    program = f"import sys; {blocked}; import {', '.join(f'crosslmm_jax.{name}' for name in present)}"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
