"""The rules of the house: packaging, the direction of imports, and the size of a file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import qcompile

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"qcompile": ROOT / "qcompile", "qcompile.passes": ROOT / "passes", "qcompile.targets": ROOT / "targets"}
MAX_LINES = 400


def _modules() -> dict[str, Path]:
    """Every module of the package, by its import name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):  # rglob does not follow the symlinks inside qcompile/
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = _modules()
SOURCES = sorted(
    path
    for folder in ("qcompile", "passes", "targets", "tests", "examples", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imports(tree: ast.AST, *, deferred: bool) -> Iterator[str]:
    """What a module imports when it runs; with `deferred`, inside its functions as well."""
    for node in ast.iter_child_nodes(tree):
        if _is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (_resolve(node.module or "", alias.name) for alias in node.names)
        elif deferred or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _imports(node, deferred=deferred)


def _resolve(module: str, name: str) -> str:
    """`from a import b` imports a.b when that is a module, and a otherwise."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def imports_of(name: str, *, deferred: bool = True) -> set[str]:
    return set(_imports(ast.parse(MODULES[name].read_text()), deferred=deferred))


def _layer(module: str) -> int | None:
    """The height of a module in errors, arith <- ir <- ops <- passes <- targets <- compiler; None outside."""
    for height, members in enumerate(
        (
            ("qcompile.errors",),
            ("qcompile.arith",),
            ("qcompile.ir",),
            ("qcompile.selectors", "qcompile.config"),
            ("qcompile.ops",),
            ("qcompile.passes",),
            ("qcompile.targets",),
            ("qcompile.compiler",),
        )
    ):
        if any(module == member or module.startswith(f"{member}.") for member in members):
            return height
    return None


def _uses(module: str, library: str) -> bool:
    return any(imported.split(".")[0] == library for imported in imports_of(module))


def test_the_packages_list_names_every_folder() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(settings["packages"]) == folders
    assert settings["package-dir"] == {"qcompile.passes": "passes", "qcompile.targets": "targets"}


def test_every_folder_with_modules_is_a_package() -> None:
    assert {path.parent for path in MODULES.values()} == {
        path.parent for path in MODULES.values() if path.name == "__init__.py"
    }


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module: str) -> None:
    height = _layer(module)
    if height is not None:
        upward = {i for i in imports_of(module) if (_layer(i) or 0) > height}
        assert not upward, f"{module} imports from a higher layer: {upward}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_targets_import_tvm(module: str) -> None:
    assert module.startswith("qcompile.targets") or not (_uses(module, "tvm") or _uses(module, "tvm_ffi"))


@pytest.mark.parametrize("module", ["qcompile", "qcompile.errors", "qcompile.artifact", "qcompile.runtime"])
def test_what_a_device_needs_imports_neither_torch_nor_the_compiler(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "loaded = {name.split('.')[0] for name in sys.modules} & {'torch', 'tvm'}\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


@pytest.mark.parametrize("name", qcompile.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(qcompile, name) is not None
    assert name in dir(qcompile)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qcompile.nonsense


def test_no_public_name_is_that_of_a_module() -> None:
    """Or importing the module would put it in the name's place."""
    modules = {name.partition(".")[2] for name in MODULES}
    assert modules & set(qcompile.__all__) == set(qcompile._SUBPACKAGES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is(module: str) -> None:
    path = MODULES[module]
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_no_file_reads_pickles_or_evaluates_text() -> None:
    for name, path in MODULES.items():
        called = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
        assert not called & {"eval", "exec", "pickle.load", "pickle.loads"}, name
        assert "pickle" not in imports_of(name), name


def test_the_design_names_what_is_public_and_every_target() -> None:
    text = (ROOT / "docs" / "design.md").read_text().split("## The public names")[1].split("\n## ")[0]
    table, targets = text.split("\nTargets: ")
    named = {name for row in table.splitlines() if row.startswith("| to") for name in re.findall(r"`(\w+)`", row)}
    assert named == set(qcompile.__all__)
    own = set(qcompile.targets.names()) - {entry.name for entry in entry_points(group="qcompile.targets")}
    assert set(re.findall(r"`([\w-]+)`", targets)) == own
