"""The table of docs/architecture.md is true: who imports whom and which libraries, never upward, never in a circle."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PAGE = ROOT / "docs/architecture.md"


OLD_NAMES = {("rdrop.experiments.recipe", "rdrop.experiments.recipes")}
"""Where a module gives out, when asked, a name that stands elsewhere now. That is no dependency."""


class Layer(NamedTuple):
    """A row of the table: the modules and packages in it, the layers they may import and the libraries they may use."""

    name: str
    members: tuple[str, ...]
    imports: frozenset[str]
    libraries: frozenset[str]


def layers() -> list[Layer]:
    table = PAGE.read_text(encoding="utf-8").split("<!-- layers -->")[1].split("<!-- /layers -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    found: list[Layer] = []
    for name, members, imports, libraries in rows:
        below = {layer.name for layer in found}
        allowed = below if imports == "all above" else set(re.findall(r"\w+", imports))
        assert allowed <= below, f"{name} may import {allowed - below}, which is not above it"
        named = tuple(re.findall(r"`([\w.]+)`", members))
        found.append(Layer(name, named, frozenset(allowed), frozenset(libraries.split(", ")) - {""}))
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
LAYERS = layers()


def imports_of(module: str) -> Iterator[tuple[str, str]]:
    """What the module imports, anywhere in it: (module, name), absolute, the name "" where the module itself is meant.

    Imports inside functions and those for type checkers count; so does `import_module("rdrop...")`.
    """
    for imported, name in all_imports_of(module):
        if (module, imported) not in OLD_NAMES:
            yield imported, name


def all_imports_of(module: str) -> Iterator[tuple[str, str]]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            start = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner, "") if inner in MODULES else (base, alias.name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((match[1], "") for match in re.finditer(r"'(rdrop[\w.]*\w)\.?", ast.unparse(node)))


def layer_of(module: str) -> Layer:
    """The layer with the longest member that is the module or a package around it; `rdrop` is its own file alone."""
    fitting = [
        (len(member), layer)
        for layer in LAYERS
        for member in layer.members
        if module == member or (member != "rdrop" and module.startswith(f"{member}."))
    ]
    assert fitting, f"{module} is in no row of the table in docs/architecture.md"
    return max(fitting, key=lambda pair: pair[0])[1]


def test_the_tree_of_the_page_is_the_tree():
    """Each line names a file or folder that is there, and of each folder with lines below it none is missing."""
    block = PAGE.read_text(encoding="utf-8").split("## The tree")[1].split("##")[0]
    named: list[Path] = []
    open_folders: list[tuple[int, Path]] = []
    for indent, name in re.findall(r"^ {4}( *)([\w./]+)", block, re.MULTILINE):
        while open_folders and open_folders[-1][0] >= len(indent):
            open_folders.pop()
        path = (open_folders[-1][1] if open_folders else ROOT) / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), path
        named.append(path)
        if name.endswith("/"):
            open_folders.append((len(indent), path))
    for folder in {path.parent for path in named} - {ROOT, SOURCE}:
        there = {path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
        assert {path for path in there if not path.name.startswith("__")} - set(named) == set()


def test_every_module_is_in_a_layer_and_every_member_exists():
    assert {member for layer in LAYERS for member in layer.members} <= set(MODULES)
    assert {layer_of(module).name for module in MODULES} == {layer.name for layer in LAYERS}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_a_layer_imports_what_the_table_says_and_no_more(layer):
    arrows, libraries = defaultdict(set), set()
    for module in MODULES:
        if layer_of(module) is layer:
            for imported, _ in imports_of(module):
                top = imported.partition(".")[0]
                if top == "rdrop":
                    arrows[layer_of(imported).name].add(f"{module} -> {imported}")
                elif top not in sys.stdlib_module_names:
                    libraries.add(top)
    arrows.pop(layer.name, None)
    order = [each.name for each in LAYERS]
    upward = [arrow for name in arrows if order.index(name) > order.index(layer.name) for arrow in arrows[name]]
    assert upward == []
    new = [arrow for name in arrows.keys() - layer.imports for arrow in arrows[name]]
    assert new == [], f"if that is meant, the row may import {', '.join(sorted(arrows, key=order.index))}"
    assert layer.imports - arrows.keys() == set(), "the table allows what is no longer there"
    assert libraries - layer.libraries == set(), "the row does not name this library"


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        module: {imported for imported, _ in imports_of(module) if imported in MODULES and imported != module}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_module_imports_a_private_name_of_another():
    private = [
        f"{module}: {imported}.{name}"
        for module in MODULES
        for imported, name in imports_of(module)
        if imported.startswith("rdrop") and any(map(is_private, (*imported.split("."), name)))
    ]
    assert private == []
