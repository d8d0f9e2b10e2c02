"""The house: CONTRIBUTING's map is the tree, imports run one way, files and lines stay short."""

import ast
import re
from collections import Counter

from helpers import ROOT, TESTS

PACKAGE = ROOT / "adam_jax"
FILES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}


def on_the_map():
    """The package's files in the order in which CONTRIBUTING names them."""
    drawing = (
        (ROOT / "CONTRIBUTING.md").read_text().split("    adam_jax/\n")[1].split("    tests/")[0]
    )
    folder, found = "", []
    for line in drawing.splitlines():
        indent, name = re.match(r"( *)(\S*)", line).groups()
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py"):
            found.append((folder if len(indent) > 6 else "") + name)
    return found


def imports(path):
    """The files of the package that a file imports, as soon as it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("adam_jax"):
            module = node.module.removeprefix("adam_jax").lstrip(".").replace(".", "/")
            for name in [alias.name for alias in node.names]:
                inside = f"{module}/{name}".lstrip("/")
                places = [f"{inside}.py", f"{inside}/__init__.py", f"{module}.py"]
                places.append(f"{module}/__init__.py".lstrip("/"))
                yield next(place for place in places if place in FILES)


def test_the_map_is_the_tree():
    assert sorted(on_the_map()) == sorted(FILES)


def test_a_file_imports_only_from_those_above_it():
    """But for what gathers the public names of a folder, which stands on top of it."""
    order = {name: i for i, name in enumerate(on_the_map())}
    for name, path in FILES.items():
        for other in imports(path):
            gathers = name.endswith("__init__.py")
            inside = other.startswith(name.removesuffix("__init__.py"))
            assert order[other] < order[name] or (gathers and inside), (name, other)


def test_no_file_is_long():
    """`family.py` is the one list of all optimizers."""
    folders = ("adam_jax", "tests", "benchmarks", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    long = {path for path in files if len(path.read_text().splitlines()) > 300}
    assert long == {PACKAGE / "family.py"}


def test_modules_of_tests_have_different_names():
    """They are imported by their names, whatever folder they are in."""
    names = Counter(path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py")
    assert {name for name, times in names.items() if times > 1} == set()
