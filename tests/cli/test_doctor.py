"""`python -m adam_jax doctor`: what it finds, and that each of its checks can fail."""

import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ROOT

import adam_jax
from adam_jax._cli import checks, doctor
from adam_jax._cli.main import main


def verdicts(*names):
    """Of some checks."""
    by_name = {check.name: check for check in doctor.all_checks()}
    return {name: checks.run_check(by_name[name])["ok"] for name in names}


def test_all_is_well_here(capsys):
    assert main(["doctor", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["adam_jax"] == adam_jax.__version__
    assert found["jax"]["backend"] == "cpu"
    assert found["jax"]["devices"][0]["count"] == len(jax.devices())
    assert found["jax"]["x64"] is False
    assert all(
        its["version"] or its["install"].startswith("pip install ")
        for its in found["optional"].values()
    )
    assert [check["name"] for check in found["checks"] if not check["ok"]] == []
    assert len(found["checks"]) == 9


def test_x64_and_the_environment_are_seen(x64, monkeypatch):
    monkeypatch.setenv("XLA_SOMETHING", "1")
    monkeypatch.setenv("SECRET", "1")
    found = doctor.examine()
    assert found["jax"]["x64"] is True
    assert found["environment"]["XLA_SOMETHING"] == "1"
    assert "SECRET" not in found["environment"]
    assert all(check["ok"] for check in found["checks"])


def test_the_table_is_plain_when_piped_and_drawn_in_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(doctor, "all_checks", lambda: _doctor_checks()[:1])
    assert main(["doctor"]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert f"\njax               {jax.__version__}\n" in plain
    assert plain.endswith("\nAll is well.\n")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["doctor"]) == 0
    assert "\x1b[" in sys.stdout.getvalue()


_doctor_checks = doctor.all_checks


def test_what_is_not_installed_says_what_it_would_give(capsys, monkeypatch):
    found = importlib.metadata.version

    def version(name):
        if name in ("flax", "tensorboardX"):
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "all_checks", list)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert 'not installed  event files: --log-dir: pip install -e ".[log]"' in said
    assert 'the network of the training run: pip install -e ".[demo]"' in said


def test_a_failure_says_what_to_do(capsys, monkeypatch):
    failing = checks._Check("a check", lambda: (False, "no good"), "Mend it")
    raising = checks._Check("another", lambda: 1 // 0, "Divide by less")
    monkeypatch.setattr(doctor, "all_checks", lambda: [failing, raising])
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "FAILED  no good\n" in said
    assert "FAILED  ZeroDivisionError: " in said
    assert said.endswith("a check: Mend it.\nanother: Divide by less.\n")
    assert main(["doctor", "--json"]) == 1


def test_the_oldest_versions_are_those_of_the_project():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [f"{name}>={least}" for name, least in checks.OLDEST.items()] == wanted


@pytest.mark.parametrize(
    ("version", "ok"), [("0.5.3", False), ("0.6.0", True), ("0.10.0.dev1", True), ("1.0", True)]
)
def test_an_old_version_fails(monkeypatch, version, ok):
    monkeypatch.setattr(checks, "version_of", lambda name: version if name == "jax" else "9.9.9")
    found, said = checks._new_enough()
    assert found is ok
    assert ok or said.startswith("jax 0.5.3 is older than")


def test_the_exact_path_is_adams(standard_promotion):
    gradients = checks._gradients()
    tx, at = optax.adam(checks.RATE, checks.B1, checks.B2, checks.EPS), jnp.zeros(checks.SHAPE)
    state = tx.init(at)
    for grads in gradients:
        updates, state = tx.update(grads, state)
        at = optax.apply_updates(at, updates)
    np.testing.assert_allclose(at, checks._exact(gradients), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"b2": 0.99}, {"b1": 0.8}, {"learning_rate": 0.02}], ids=str)
def test_wrong_numbers_fail(monkeypatch, wrong):
    adam, defaults = adam_jax.adam, {"learning_rate": checks.RATE, "b1": checks.B1, "b2": checks.B2}
    monkeypatch.setattr(
        checks, "adam", lambda *_, storage: adam(**(defaults | wrong), storage=storage)
    )
    found = verdicts("Adam, float32 moments", "Adam, bfloat16 moments", "Adam, 8bit moments")
    assert not found["Adam, float32 moments"]
    # What is less than the error of narrow moments themselves passes.
    assert (
        found["Adam, bfloat16 moments"]
        == found["Adam, 8bit moments"]
        == ("learning_rate" not in wrong)
    )


def test_rounding_to_nearest_fails(monkeypatch):
    nothing = optax.identity
    monkeypatch.setattr(adam_jax, "round_stochastically", nothing)
    monkeypatch.setattr(adam_jax, "compensate", nothing)
    assert not any(verdicts("stochastic rounding", "compensated rounding").values())


def test_without_donation_it_fails(monkeypatch):
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, donate_argnums=None, **rest: jit(f, **rest))
    assert not any(verdicts("donation").values())


BARE = """
import sys
for name in ("flax", "equinox", "orbax", "rich", "matplotlib", "sklearn", "tensorboardX", "torch"):
    sys.modules[name] = None
sys.stdout.isatty = lambda: True
from adam_jax._cli.main import main
sys.exit(main(["doctor"]))
"""


def run_doctor(code, **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment}
    command = [sys.executable, *code]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_it_needs_jax_and_optax_alone_and_eight_devices_share_a_state():
    done = run_doctor(["-c", BARE], XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\nAll is well.\n")
    assert "8 of them give the bits of one" in done.stdout


def test_a_backend_that_does_not_start_is_found():
    done = run_doctor(["-m", "adam_jax", "doctor"], JAX_PLATFORMS="nowhere")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert (
        "devices: JAX cannot start: unset JAX_PLATFORMS, or install the jax that its devices "
        "need.\n" in done.stdout
    )


def test_a_reader_that_goes_ends_it_quietly():
    """D2: it ended in a traceback."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "adam_jax", "describe"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as gone:
        gone.stdout.close()
        assert (gone.stderr.read(), gone.wait(60)) == ("", -signal.SIGPIPE)
