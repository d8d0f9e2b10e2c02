"""The notebooks as they are committed: begun alike, run once from top to bottom, quiet, and fit to
be looked at. CI runs them.
"""

import re

import nbformat
import pytest
from helpers import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIRST_CELL = """\
# Where adam_jax comes from if it is not installed: a clone, a wheel, or "git+https://…".
PLACE = ".."

import importlib.util

if importlib.util.find_spec("adam_jax") is None:
    wanted = f"adam_jax[notebooks] @ {PLACE}" if "://" in PLACE else f"{PLACE}[notebooks]"
    %pip install -q "{wanted}"

import jax

import adam_jax

print("adam_jax", adam_jax.__version__, "on JAX", jax.__version__, "on", *jax.devices())"""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    return found


@pytest.fixture
def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def outputs(code):
    return [output for cell in code for output in cell.outputs]


def test_numbered_from_one():
    assert [re.match(r"(\d)_[a-z_]+$", path.stem)[1] for path in NOTEBOOKS] == [
        str(i + 1) for i in range(len(NOTEBOOKS))
    ]


def test_begins_with_its_title_and_the_common_cell(notebook, path):
    title, first = notebook.cells[:2]
    assert title.cell_type == "markdown"
    assert re.match(rf"# {path.stem[0]} \S", title.source)
    assert first.source == FIRST_CELL


def test_ran_once_from_top_to_bottom(code):
    assert all(cell.source.strip() for cell in code)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_quiet(outputs):
    """No exception, and nothing on stderr, where warnings go."""
    assert [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ] == []


def test_prints_in_one_piece(code):
    """Each piece would be a box of its own on the page."""
    names = [
        [output.get("name") for output in cell.outputs if output.output_type == "stream"]
        for cell in code
    ]
    assert [found for found in names if len(found) > 1] == []


def test_has_figures(outputs):
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_names_no_machine(outputs):
    """Text of outputs: a path of the machine that ran them, or the address of an object, is noise
    in every diff.
    """
    text = "\n".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for output in outputs
    )
    assert (
        re.findall(r"/(?:home|root|tmp|work|usr|opt|content|Users)/\S*|0x[0-9a-f]{6,}", text) == []
    )


def test_is_kept_small(path):
    assert path.stat().st_size < 1_500_000


def test_metadata_says_nothing_of_the_run(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "accelerator", "colab"}
    assert [cell.metadata for cell in notebook.cells if "execution" in cell.metadata] == []


def test_is_listed(path):
    assert f"]({path.name})" in (FOLDER / "README.md").read_text()
