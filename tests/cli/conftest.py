"""Fixtures of the tests of the command line: images in a file, small networks, a run, a refusal."""

import functools
import re

import pytest
from small_demo import Dense, save

from adam_jax._cli import demo
from adam_jax._cli.main import main


@pytest.fixture
def write(tmp_path):
    return functools.partial(save, tmp_path / "images.npz")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "Network", Dense)


@pytest.fixture
def demonstrate(tmp_path, capsys):
    """Runs the command line in a few steps; gives what it printed and the path of the figure."""

    def call(*arguments, output="figure.png"):
        path = tmp_path / output
        assert (
            main(
                ["--steps", "12", "--batch-size", "16", "--output", str(path), *map(str, arguments)]
            )
            == 0
        )
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out, path

    return call


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch):
    """Runs the command line on wrong arguments; gives its one line on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run", lambda *_: pytest.fail("it went on to train"))

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(list(map(str, arguments)))
        printed = capsys.readouterr()
        assert stopped.value.code == 2
        assert printed.out == ""
        assert re.fullmatch(r"adam_jax: error: [^\n]+\n", printed.err)
        return printed.err

    return call
