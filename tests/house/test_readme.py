"""README's and the docs' Python blocks run as they stand, and name nothing that does not exist."""

import re

import jax
import pytest
from helpers import ROOT

import adam_jax

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, i, code)
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


NEEDS = {
    "jax.shard_map(": hasattr(jax, "shard_map"),
    "nn.scan(": hasattr(jax.sharding.NamedSharding, "update"),  # Flax 0.11's needs it
}
"""What the oldest JAX has not, and some pages show."""


@pytest.mark.filterwarnings("error:.*rounds nothing")
@pytest.mark.parametrize(
    ("page", "number", "code"), BLOCKS, ids=[f"{page}-{i}" for page, i, _ in BLOCKS]
)
def test_block_runs(page, number, code):
    if lacks := [word for word, there in NEEDS.items() if word in code and not there]:
        pytest.skip(f"this version of JAX has no {lacks[0]}")
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):  # as a user has them
        exec(compile(code, f"{page} block {number}", "exec"), {"__name__": "readme"})


def test_readme_has_its_examples():
    assert sum(page == "README.md" for page, _, _ in BLOCKS) >= 3


def test_every_public_name_is_documented():
    api = (ROOT / "docs" / "api.md").read_text()
    modules = re.findall(r"\.\. automodule:: adam_jax\.(\S+)", api)
    described = re.findall(r"\.\. auto(?:function|class):: adam_jax\.(\S+)", api)
    assert {*adam_jax.__all__} <= {*modules, *described}
    assert all(getattr(adam_jax, name).__doc__ for name in adam_jax.__all__)
    names = {name.rpartition(".")[2] for name in described}
    for module in (adam_jax.stages, adam_jax.diagnostics, adam_jax.migrate, adam_jax.storage):
        assert {*module.__all__} <= names, module
    listed_on_top = re.findall(r"^   ~adam_jax\.(\S+)$", api, re.M)
    assert listed_on_top == described


def test_the_top_level_stays_small():
    assert len(adam_jax.__all__) <= 50


@pytest.mark.parametrize("page", ["README.md", "docs/family.md", "docs/equations.md"])
def test_every_member_is_in_the_table(page):
    text = (ROOT / page).read_text()
    assert [name for name in adam_jax.family.__all__ if f"`{name}`" not in text] == []


def test_docstrings_of_members():
    """One line that says what it is, equations, a source with a year and a place in it, and what
    others do.
    """
    for name in adam_jax.family.__all__:
        doc = getattr(adam_jax, name).__doc__
        assert re.match(r"[A-Z].*\.\n", doc), name
        assert "learning_rate·" in doc, name
        assert re.search(r"Source: .*\((19|20)\d\d\)", doc, re.S), name
        assert "Elsewhere: " in doc, name
