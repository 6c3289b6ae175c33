"""`__all__` is what other files may use: sorted, existing, and complete for all that they do use."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("aggregator", "edge_client", "export", "fedtt", "fleet", "storage")


def _modules() -> dict[str, Path]:
    """Every module of ours by its dotted name; scripts of the migration tool are none."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    pairs = zip((name.removesuffix(".__init__") for name in names), paths, strict=True)
    return {name: path for name, path in pairs if ".migrations" not in name and not name.endswith("__main__")}


MODULES = _modules()


def _public(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def _in_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Types, then functions: the order that ruff keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def _imports(name: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of everything a module takes from a module of ours."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                if source in MODULES and f"{source}.{alias.name}" not in MODULES:
                    yield source, alias.name


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
PUBLIC = {name: names for name, tree in TREES.items() if (names := _public(tree)) is not None}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_sorted_and_exist(module: str) -> None:
    names = PUBLIC[module]
    assert names == sorted(set(names), key=_in_order)
    loaded = import_module(module)
    assert [name for name in names if not hasattr(loaded, name)] == []
    assert [name for name in names if name.startswith("_")] == []


def test_every_module_that_defines_something_says_what_of_it_is_public() -> None:
    defining = {
        name
        for name, tree in TREES.items()
        if any(isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name[0] != "_" for n in tree.body)
    }
    assert defining - PUBLIC.keys() == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_takes_only_public_names_from_others(module: str) -> None:
    taken = list(_imports(module, TREES[module]))
    assert [f"{source}.{name}" for source, name in taken if name not in PUBLIC.get(source, ())] == []


def test_the_core_lists_every_function_and_type_it_defines() -> None:
    for name in (name for name in PUBLIC if name.split(".")[0] == "fedtt"):
        defined = [n.name for n in TREES[name].body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        assert {n for n in defined if not n.startswith("_")} <= set(PUBLIC[name]), name
