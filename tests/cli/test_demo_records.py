"""What a run of the demo leaves behind: its checkpoints are not trained again, its events hold its
curves.

The oracle is what the run itself printed and returned.
"""

import contextlib
import io
import struct
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from small_demo import IMAGES, Dense, save, table

from adam_jax._cli import demo
from adam_jax._cli.main import main

pytest.importorskip("rich")


class Logged(NamedTuple):
    directory: Path
    options: list
    out: str
    courses: list


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run that is kept and logged, for all tests that look at one; its options, what it printed,
    and its courses.
    """
    pytest.importorskip("orbax.checkpoint")
    pytest.importorskip("tensorboardX")
    directory, courses, run = tmp_path_factory.mktemp("logged"), [], demo.run
    data = save(directory / "images.npz")
    options = [
        "--data",
        data,
        "--optimizers",
        "sgd,adam",
        "--learning-rate",
        0.01,
        "--log-dir",
        directory / "logs",
    ]
    options += ["--checkpoint-every", 4, "--checkpoint-dir", directory / "runs"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(demo, "Network", Dense)
        patch.setattr(demo, "run", lambda *its: courses.append(run(*its)) or courses[-1])
        numbers = ["--steps", "12", "--batch-size", "16", "--output", str(directory / "figure.png")]
        assert main([*numbers, *map(str, options)]) == 0
    return Logged(directory, options, out.getvalue(), courses)


def test_a_run_that_is_over_is_not_trained_again(logged, demonstrate, quick):
    options = [
        its if its != logged.directory / "logs" else logged.directory / "again"
        for its in logged.options
    ]
    again, _ = demonstrate(*options, "--resume")
    assert table(logged.out) == table(again)  # the seconds, too
    assert "adam: going on from step 12\n" in again
    assert "adam: training" not in again


def test_checkpoints_of_another_run_are_refused(logged, refusal, write, quick):
    options = [
        "--steps",
        12,
        "--batch-size",
        16,
        "--optimizers",
        "adam",
        "--checkpoint-dir",
        logged.directory / "runs",
    ]
    data, rate = ["--data", write()], ["--learning-rate", 0.01]
    setting = [*options, *data, *rate]
    said = refusal(*setting)
    assert "--checkpoint-dir: found checkpoints in" in said
    assert "Add --resume" in said
    for changed, says in (
        (["--seed", 1], "made with --seed 0; this run has --seed 1."),
        (
            ["--steps", 13, "--storage", "8bit"],
            "made with --steps 12 --storage float32; this run has --steps 13 --storage 8bit.",
        ),
    ):
        assert says in refusal(*setting, "--resume", *changed)
    assert "made with --learning-rate 0.01; this run has --learning-rate not given" in refusal(
        *options, *data, "--resume"
    )
    assert "made with --data" in refusal(
        *options, *rate, "--resume", "--data", write(x_test=IMAGES["x_test"] + 1)
    )


def events(directory):
    """The events of all files in a folder, oldest first:

    TFRecords of length, its checksum, the event, its checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def scalars(found):
    """(tag, step) -> value, where what a later start overrides is dropped, as TensorBoard does."""
    kept = {}
    for event in found:
        if event.HasField("session_log"):
            kept = {key: value for key, value in kept.items() if key[1] < event.step}
        for value in event.summary.value:
            kept[value.tag.replace("_", " "), event.step] = value.simple_value
    return kept


def test_events_hold_the_curves(logged):
    assert f"tensorboard --logdir {logged.directory / 'logs'}\n" in logged.out
    for name, course in zip(("sgd", "adam"), logged.courses, strict=True):
        found = scalars(events(logged.directory / "logs" / name))
        expected = {
            ("training loss", s): loss for s, loss in zip(course.steps, course.losses, strict=True)
        }
        expected |= {
            ("test accuracy", s): found
            for s, found in zip(course.steps, course.accuracies, strict=True)
        }
        expected |= {("learning rate", s): course.rate for s in course.steps}
        looks = {key: found.pop(key) for key in list(found) if key[0].startswith("all/")}
        assert found == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}
        norms = {step: value for (tag, step), value in looks.items() if tag == "all/gradient norm"}
        assert set(norms) == set(range(1, max(course.steps) + 1, 10))
        assert min(norms.values()) > 0


def test_a_resumed_run_logs_each_step_once(
    logged, demonstrate, write, quick, tmp_path, monkeypatch, capsys
):
    options = [
        "--data",
        write(),
        "--optimizers",
        "adam",
        "--learning-rate",
        0.01,
        "--checkpoint-every",
        4,
    ]
    from adam_jax._cli import report

    draw = report.progress

    class Failing:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def __call__(self, name, doing, done):
            if doing.startswith("training") and done >= 7:
                raise KeyboardInterrupt

    monkeypatch.setattr(report, "progress", lambda *_: Failing())
    options += ["--checkpoint-dir", tmp_path / "runs", "--log-dir", tmp_path / "logs"]
    assert (
        main(
            [
                "--steps",
                "12",
                "--batch-size",
                "16",
                "--output",
                str(tmp_path / "a.png"),
                *map(str, options),
            ]
        )
        == 130
    )
    assert "Interrupted. The same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.setattr(report, "progress", draw)
    time.sleep(1.1)  # the files are told apart by the second in their names
    demonstrate(*options, "--resume")
    found, whole = (
        events(tmp_path / "logs" / "adam"),
        scalars(events(logged.directory / "logs" / "adam")),
    )
    assert len(list((tmp_path / "logs" / "adam").iterdir())) == 2
    assert scalars(found) == whole
    assert sum(bool(event.summary.value) for event in found) > len(
        whole
    )  # steps that were lost are logged again
