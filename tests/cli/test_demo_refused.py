"""Wrong options and data of the demo end with one line that says what was found and what was
expected.

The expected messages are written out here.
"""

import sys

import numpy as np
import pytest
from small_demo import IMAGES

from adam_jax._cli.main import main

pytest.importorskip("rich")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--optimizers", "adm"), "did you mean adam?"),
        (("--optimizers", "adam-mini"), "did you mean adam_mini?"),
        (("--optimizers", "lbfgs"), "known are sgd, adam"),
        (("--optimizers", ","), "no name"),
        (("--steps", 0), "--steps: found 0"),
        (("--steps", "many"), "--steps: invalid int"),
        (("--batch-size", 0), "--batch-size: found 0"),
        (("--batch-size", 1151), "at most the 1150 training images (287 more"),
        (("--batch-size", 1438, "--learning-rate", 0.1), "at most the 1437 training images"),
        (("--learning-rate", 0), "--learning-rate: found 0"),
        (("--learning-rate", "nan"), "--learning-rate: found nan"),
        (("--learning-rate", "inf"), "--learning-rate: found inf"),
        (("--learning-rate", "1e39"), "--learning-rate: found 1e+39"),
        (("--seed", -1), "--seed: found -1"),
        (("--output", "figure.txt"), "ends in .png"),
        (("--output", "nowhere/figure.png"), "No such file or directory"),
        (("--output", "/proc/figure.png"), "cannot write '/proc/figure.png'"),
        (("--data", "nowhere.npz"), "nowhere.npz: No such file"),
        (("--data", "."), "Is a directory"),
        (("--data", __file__), "not an .npz file"),
        (
            ("--storage", "4bit"),
            "--storage: found '4bit'; expected float32, bfloat16, 8bit, or two",
        ),
        (("--storage", "8bit,8bit,8bit"), "--storage: found"),
        (("--storage", ""), "--storage: found ''"),
        (
            ("--precision", "float16"),
            "--precision: found 'float16'; expected float32, bfloat16, bfloat16-stochastic",
        ),
        (("--devices", 0), "--devices: found 0"),
        (("--checkpoint-every", 0), "--checkpoint-every: found 0"),
        (("--resume",), "--resume: found no --checkpoint-dir"),
        (("--checkpoint-every", 4), "--checkpoint-every: found no --checkpoint-dir"),
        (("--checkpoint-dir", ""), "--checkpoint-dir: found ''; expected the name of a directory"),
        (("--log-dir", " "), "--log-dir: found ' '; expected the name of a directory"),
        (("--checkpoint-dir", __file__), "--checkpoint-dir: cannot write in"),
        (("--log-dir", "/proc/logs"), "--log-dir: cannot write in '/proc/logs': No such file"),
        (
            ("docter",),
            "command: found 'docter'; did you mean doctor? known are train, describe, doctor",
        ),
        (("train", "--steps", 0), "--steps: found 0"),
        (("--rate", 1), "unrecognized arguments"),
    ],
)
def test_wrong_options(refusal, arguments, says):
    assert says in refusal(*arguments)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"y_test": None, "x_test": None}, "no array x_test, y_test"),
        ({"y_train": np.arange(7)}, "80 images in x_train but 7 labels"),
        ({"x_test": np.ones((20, 6, 6))}, "x_test: found images of shape (6, 6); expected (6, 5)"),
        ({"x_train": np.ones((80, 30))}, "x_train: found shape (80, 30)"),
        ({"x_train": np.ones((80, 3, 8))}, "4x4 pixels"),
        (
            {"x_train": np.ones((0, 6, 5)), "y_train": np.ones(0, int)},
            "x_train: found shape (0, 6, 5)",
        ),
        ({"x_train": np.full((80, 6, 5), np.nan)}, "x_train: found pixels that are NaN"),
        ({"x_test": np.full((20, 6, 5), "a")}, "x_test: found dtype <U1"),
        ({"x_test": np.full((20, 6, 5), None)}, "Object arrays"),
        ({"y_train": IMAGES["y_train"] / 2}, "y_train: found dtype float64"),
        ({"y_train": IMAGES["y_train"][:, None]}, "y_train: found shape (80, 1)"),
        ({"y_train": IMAGES["y_train"] - 1}, "y_train: found label -1"),
        ({"y_train": IMAGES["y_train"] * 10**9}, "2 classes, the highest 1000000000"),
        ({"y_train": IMAGES["y_train"] * 0}, "1 classes"),
        ({"y_test": IMAGES["y_test"] + 1}, "y_test: found label 2"),
    ],
)
def test_wrong_data(refusal, write, changed, says):
    assert says in refusal("--data", write(**changed), "--batch-size", 16)


def test_a_damaged_file(refusal, write):
    path = write()
    content = bytearray(path.read_bytes())
    content[200:300] = bytes(100)
    path.write_bytes(content)
    assert "images.npz" in refusal("--data", path)


def test_without_the_extras(refusal, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flax", None)
    assert 'flax not installed; run, in its folder: pip install -e ".[demo]"' in refusal()
    assert main(["--list"]) == 0
    assert capsys.readouterr().out


def test_checking_leaves_the_output_as_it_was(refusal, tmp_path):
    old = tmp_path / "old.png"
    old.write_bytes(b"kept")
    refusal("--output", old, "--data", "nowhere.npz")
    refusal("--output", tmp_path / "new.png", "--data", "nowhere.npz")
    assert old.read_bytes() == b"kept"
    assert not (tmp_path / "new.png").exists()


def test_without_what_checkpoints_and_events_need(refusal, monkeypatch, quick):
    for module, option, extra in (
        ("orbax", "--checkpoint-dir", "scale"),
        ("tensorboardX", "--log-dir", "log"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert (
            f'{module} not installed; run, in its folder: pip install -e ".[{extra}]"'
            in refusal(option, "runs")
        )


def test_a_folder_that_is_a_file_is_refused(refusal, tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "adam").touch()
    assert "--log-dir: cannot write in" in refusal("--optimizers", "adam", "--log-dir", tmp_path)
