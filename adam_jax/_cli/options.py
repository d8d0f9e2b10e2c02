"""The options of `python -m adam_jax`, and the checks of what they say."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import adam_jax
from adam_jax._cli import choices
from adam_jax._cli.choices import OPTIMIZERS, PRECISIONS

EXTRAS = ("flax", "matplotlib", "rich", "sklearn")

FORMATS = (".png", ".pdf", ".svg")

EVERY = 50
"""Steps between two checkpoints."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line: the usage would hide what went wrong."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def add_precision_options(option: Callable[..., Any]) -> None:
    """The options that training and `describe` have in common."""
    option(
        "--storage",
        default="float32",
        metavar="NAME",
        help="of the moments: float32, bfloat16 or 8bit, or two of them with a comma, for mu and "
        "nu (%(default)s)",
    )
    option(
        "--precision",
        default="float32",
        metavar="NAME",
        help=f"of the parameters: {', '.join(PRECISIONS)} (%(default)s); plain bfloat16 rounds to "
        "nearest",
    )


def training_parser() -> Parser:
    parser = Parser(
        prog="adam_jax",
        description="Trains the same small convolutional network from the same start with several "
        "optimizers, each at the best learning rate of a sweep, and writes a table "
        "and a figure.",
        epilog="Two more commands: `describe` shows what an optimizer is made of and what it "
        "weighs, `doctor` what is installed here and whether it works. Each has a --help "
        "of its own.",
    )
    option = parser.add_argument
    option(
        "--optimizers",
        default="sgd,momentum,rmsprop,adam",
        metavar="NAMES",
        help="separated by commas (%(default)s)",
    )
    option(
        "--steps",
        type=int,
        default=300,
        metavar="N",
        help="training steps of each run (%(default)s)",
    )
    option(
        "--learning-rate", type=float, metavar="RATE", help="one rate for all, instead of the sweep"
    )
    option("--batch-size", type=int, default=64, metavar="N", help="images a step (%(default)s)")
    option(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of start, batches and validation split (%(default)s)",
    )
    option(
        "--output",
        type=Path,
        default=Path("adam_jax_demo.png"),
        metavar="FILE",
        help="the figure, .png, .pdf or .svg (%(default)s)",
    )
    option(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="arrays x_train, y_train, x_test, y_test: your images, (n, height, width) or (n, "
        "height, width, channels), halved until a side is at most 16 pixels, and labels from "
        "0 (the digits of scikit-learn)",
    )
    option("--list", action="store_true", help="name every optimizer and stop")
    add_precision_options(option)
    option(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="each takes its part of a batch and of the optimizer's state (%(default)s); the "
        "sweep runs on the first",
    )
    option(
        "--checkpoint-dir",
        type=_directory,
        metavar="DIR",
        help="saves each run in a folder of its own, from when the sweep has chosen its rate",
    )
    option(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help=f"steps between two checkpoints, at least ({EVERY})",
    )
    option(
        "--resume",
        action="store_true",
        help="goes on from the newest checkpoints in --checkpoint-dir, or begins where there are "
        "none; ends with the numbers of a run that was not interrupted",
    )
    option(
        "--log-dir",
        type=_directory,
        metavar="DIR",
        help="writes TensorBoard's event files, each run's in a folder of its own: "
        "losses, rates, and what `adam_jax.observe` sees",
    )
    option("--version", action="version", version=f"adam_jax {adam_jax.__version__}")
    return parser


def _directory(name: str) -> Path:
    if not name.strip():
        raise argparse.ArgumentTypeError(f"found {name!r}; expected the name of a directory")
    return Path(name)


def check_numbers(options: argparse.Namespace) -> None:
    if not 1 <= options.steps <= 1_000_000:
        raise ValueError(f"--steps: found {options.steps}; expected 1 to 1000000")
    for name in ("batch_size", "devices", "checkpoint_every"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')}: found {getattr(options, name)}; expected 1 or more"
            )
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed: found {options.seed}; expected 0 to 2^32 - 1")
    check_rate(options.learning_rate)


def check_rate(rate: float | None) -> None:
    if rate is not None and not 1e-38 < rate < 1e38:
        raise ValueError(
            f"--learning-rate: found {rate}; expected a positive number that float32 can hold"
        )


def check_precision(name: str) -> None:
    if name not in PRECISIONS:
        raise ValueError(f"--precision: found {name!r}; expected {', '.join(PRECISIONS)}")


def check_output(path: Path) -> None:
    """Opens the file. Only that finds every reason why it could not be written later."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"--output: found {str(path)!r}; expected a name that ends in {', '.join(FORMATS)}"
        )
    new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"--output: cannot write {str(path)!r}: {error.strerror}") from error
    if new:
        path.unlink()


def check_extras(names: Sequence[str], extra: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'{", ".join(missing)} not installed; run, in its folder: pip install -e ".[{extra}]"'
        )


def check_directories(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Makes them, since only that finds every reason why it could not be done later."""
    if options.resume and not options.checkpoint_dir:
        raise ValueError(
            "--resume: found no --checkpoint-dir; give the one that the run was saved in"
        )
    if options.checkpoint_every and not options.checkpoint_dir:
        raise ValueError(
            "--checkpoint-every: found no --checkpoint-dir; give one to save the run in"
        )
    if options.checkpoint_dir:
        check_extras(
            ["orbax.checkpoint"] if importlib.util.find_spec("orbax") else ["orbax"], "scale"
        )
    if options.log_dir:
        check_extras(["tensorboardX"], "log")
    for name, path in (
        ("--checkpoint-dir", options.checkpoint_dir),
        ("--log-dir", options.log_dir),
    ):
        for its in [path, *(path / run for run in names)] if path else []:
            try:
                its.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"{name}: cannot write in {str(its)!r}: {error.strerror}"
                ) from error


def check_devices(wanted: int) -> None:
    """Asks for as many CPU devices, which JAX makes if it has not started.

    There have to be as many then, of whatever kind.
    """
    import jax

    config: Any = jax.config  # some versions of JAX leave it without types
    flag = "--xla_force_host_platform_device_count"
    if wanted > 1 and flag not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # it has started
            config.update("jax_num_cpu_devices", wanted)
    there = len(jax.devices())
    if wanted > there:
        raise ValueError(
            f"--devices: found {wanted}; there are {there} ({jax.default_backend()}). "
            "CPUs can be cut into as many: set "
            f'JAX_PLATFORMS=cpu XLA_FLAGS="{flag}={wanted}"'
        )


def describe_all() -> str:
    """Every optimizer and the first line of its docstring, in two columns."""
    widest = max(map(len, OPTIMIZERS)) + 2
    width = max(shutil.get_terminal_size().columns, 40) if sys.stdout.isatty() else 1000
    lines = [
        textwrap.fill(
            first, width, initial_indent=name.ljust(widest), subsequent_indent=" " * widest
        )
        for name, first in choices.listing()
    ]
    return "\n".join(lines) + "\n"
