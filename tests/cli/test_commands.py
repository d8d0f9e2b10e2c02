"""The commands beside training: `--version`, `describe`, `train`, and what their page in the docs
says.

The oracles are `describe` and `state_bytes` of the package.
"""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT

import adam_jax
from adam_jax._cli.data import digits
from adam_jax._cli.main import main
from adam_jax._cli.setting import prepare

pytest.importorskip("rich")


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (
        0,
        f"adam_jax {adam_jax.__version__}\n",
    )


def test_describe_weighs_the_network(capsys):
    assert (
        main(
            [
                "describe",
                "--optimizer",
                "adamw",
                "--storage",
                "8bit",
                "--precision",
                "bfloat16-compensated",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    tx = adam_jax.chain(adam_jax.adamw(1e-3, storage="8bit"), adam_jax.compensate())
    params = jax.eval_shape(
        lambda: jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16),
            prepare(digits(), 1, 1, 0, sweeps=False).params,
        )
    )
    audit = adam_jax.state_bytes(tx, params)
    assert str(adam_jax.describe(tx, params)) in said
    assert f"{tx}\n" in said
    assert main(["describe", "--optimizer", "adamw", "--storage", "8bit", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["elements"] == audit.elements
    assert found["totals"]["parameters"] == 2 * audit.parameters


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--optimizer", "adm"), "--optimizer: found 'adm'; did you mean adam?"),
        (("--storage", "4bit"), "--storage: found '4bit'"),
        (("--precision", "half"), "--precision: found 'half'"),
        (("--learning-rate", "0"), "--learning-rate: found 0.0"),
        (("--steps", "3"), "unrecognized arguments: --steps"),
    ],
)
def test_wrong_options_of_describe(capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        main(["describe", *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert re.fullmatch(r"adam_jax describe: error: [^\n]+\n", printed.err)
    assert says in printed.err


def test_train_may_be_said(capsys):
    assert main(["train", "--list"]) == 0
    assert capsys.readouterr().out.startswith("sgd ")


def helped(capsys, *command):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


PAGE = ROOT / "docs" / "command-line.md"


def test_the_page_has_every_option(capsys, monkeypatch):
    """And says of each what --help says."""
    monkeypatch.setenv("COLUMNS", "120")
    text = PAGE.read_text()
    for command in ([], ["describe"], ["doctor"]):
        options = helped(capsys, *command).partition("options:\n")[2].partition("\n\n")[0].rstrip()
        assert options in text, f"docs/command-line.md lacks, of {command}:\n{options}"


def test_the_page_shows_what_describe_prints(capsys):
    assert main(["describe", "--optimizer", "adamw", "--storage", "8bit"]) == 0
    assert capsys.readouterr().out.rstrip() in PAGE.read_text()
