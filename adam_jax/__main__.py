"""`python -m adam_jax`: trains one small network with several optimizers, and shows how they did."""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib.util
import inspect
import io
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import adam_jax

EXTRAS = ("flax", "matplotlib", "rich", "sklearn")
FORMATS = (".png", ".pdf", ".svg")


def sgd(learning_rate: Any) -> adam_jax.Transformation:
    """Plain stochastic gradient descent: the learning rate and nothing else."""
    return adam_jax.chain(adam_jax.scale_by_learning_rate(learning_rate))


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {"sgd": sgd} | {name: getattr(adam_jax, name) for name in adam_jax.family.__all__}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line: the usage would hide what went wrong."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="adam_jax",
        description="Trains the same small convolutional network from the same start with several optimizers, each at the "
        "best learning rate of a sweep, and writes a table and a figure.",
    )
    option = parser.add_argument
    option("--optimizers", default="sgd,momentum,rmsprop,adam", metavar="NAMES", help="separated by commas (%(default)s)")
    option("--steps", type=int, default=300, metavar="N", help="training steps of each run (%(default)s)")
    option("--learning-rate", type=float, metavar="RATE", help="one rate for all, instead of the sweep")
    option("--batch-size", type=int, default=64, metavar="N", help="images a step (%(default)s)")
    option("--seed", type=int, default=0, metavar="N", help="of start, batches and validation split (%(default)s)")
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
        help="arrays x_train, y_train, x_test, y_test: your images, (n, height, width) or (n, height, width, channels), halved "
        "until a side is at most 16 pixels, and labels from 0 (the digits of scikit-learn)",
    )
    option("--list", action="store_true", help="name every optimizer and stop")
    return parser


def _chosen(names: str) -> list[str]:
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise ValueError("--optimizers: found no name; --list shows them all")
    for name in chosen:
        if name not in OPTIMIZERS:
            near = difflib.get_close_matches(name.lower().replace("-", "_"), OPTIMIZERS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"--optimizers: found {name!r}; {hint}known are {', '.join(OPTIMIZERS)}")
    return chosen


def _check_numbers(options: argparse.Namespace) -> None:
    if not 1 <= options.steps <= 1_000_000:
        raise ValueError(f"--steps: found {options.steps}; expected 1 to 1000000")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: found {options.batch_size}; expected 1 or more")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed: found {options.seed}; expected 0 to 2^32 - 1")
    rate = options.learning_rate
    if rate is not None and not 1e-38 < rate < 1e38:
        raise ValueError(f"--learning-rate: found {rate}; expected a positive number that float32 can hold")


def _check_output(path: Path) -> None:
    """Opens the file, since only that finds every reason why it could not be written once the work is done."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--output: found {str(path)!r}; expected a name that ends in {', '.join(FORMATS)}")
    new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"--output: cannot write {str(path)!r}: {error.strerror}") from error
    if new:
        path.unlink()


def _check_extras() -> None:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{", ".join(missing)} not installed; run, in its folder: pip install -e ".[demo]"')


def _describe_all() -> str:
    """Every optimizer and the first line of its docstring, in two columns."""
    widest = max(map(len, OPTIMIZERS)) + 2
    width = max(shutil.get_terminal_size().columns, 40) if sys.stdout.isatty() else 1000
    lines = []
    for name, make in OPTIMIZERS.items():
        first = (inspect.getdoc(make) or "").partition("\n")[0]
        lines.append(textwrap.fill(first, width, initial_indent=name.ljust(widest), subsequent_indent=" " * widest))
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      The exit status: 0, or 130 if interrupted.

    Raises:
      SystemExit: with status 2, after one line on stderr, if an option or a file is wrong, before anything is trained.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Greek letters still shows the rest
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        sys.stdout.write(_describe_all())
        return 0
    try:
        names = _chosen(options.optimizers)
        _check_numbers(options)
        _check_output(options.output)
        _check_extras()
        from adam_jax import _report, demo

        data = demo.digits() if options.data is None else demo.read(options.data)
        sweeps = options.learning_rate is None
        setting = demo.prepare(data, options.steps, options.batch_size, options.seed, sweeps)
    except ValueError as error:
        parser.error(str(error))
    try:
        with _report.progress(names, options.steps * (1 + sweeps)) as tell:
            courses = {
                name: demo.run(OPTIMIZERS[name], setting, options.learning_rate, functools.partial(tell, name)) for name in names
            }
    except KeyboardInterrupt:
        return 130
    _report.show(courses, sweeps)
    source = "scikit-learn digits" if options.data is None else options.data.name
    try:
        _report.draw(courses, options.output, f"{source}, batches of {options.batch_size}, seed {options.seed}")
    except OSError as error:
        parser.error(f"--output: cannot write {str(options.output)!r}: {error.strerror}")
    sys.stdout.write(f"\nWrote {options.output}\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
