"""Every promise of docs/promises.md names the tests that hold it, and they exist."""

import ast
import re

from helpers import TESTS

PAGE = TESTS.parent / "docs" / "promises.md"


def promises():
    """The rows of the page's tables: (promise, names of tests)."""
    rows = [re.fullmatch(r"\| (.+) \| (.+) \|", line) for line in PAGE.read_text().splitlines()]
    return [(row[1], row[2].split(", ")) for row in rows if row and row[1] != "promise"]


def functions(file):
    """The tests that a file defines."""
    (path,) = TESTS.rglob(file)
    nodes = ast.walk(ast.parse(path.read_text()))
    return {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_promise_has_its_tests():
    found = promises()
    assert len(found) > 40
    for promise, named in found:
        assert promise.endswith("."), promise
        for name in named:
            file, test = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", name).groups()
            assert test in functions(file), name


def test_nothing_else_on_the_page_names_a_test():
    """A row that the search above does not read would hold nothing."""
    assert PAGE.read_text().count("::test_") == sum(len(named) for _, named in promises())
