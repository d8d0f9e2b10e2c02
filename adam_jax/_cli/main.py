"""`python -m adam_jax`: trains one small network with several optimizers, and shows how they did.

Also `describe`, `doctor`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence

import adam_jax
from adam_jax._cli import choices
from adam_jax._cli.choices import PRECISIONS
from adam_jax._cli.options import (
    Parser,
    add_precision_options,
    check_extras,
    check_precision,
    check_rate,
)
from adam_jax._cli.training import train
from adam_jax.diagnostics.table import show_drawing


def describe(arguments: Sequence[str]) -> int:
    """Shows what an optimizer is made of, and what it weighs beside the demo's network."""
    parser = Parser(
        prog="adam_jax describe",
        description="Shows what an optimizer is made of, and what its state for the network of "
        "the training run weighs. Nothing is trained, and no array is made.",
    )
    option = parser.add_argument
    option(
        "--optimizer",
        default="adam",
        metavar="NAME",
        help="a name of `python -m adam_jax --list` (%(default)s)",
    )
    option("--learning-rate", type=float, default=1e-3, metavar="RATE", help="(%(default)s)")
    add_precision_options(option)
    option("--json", action="store_true", help="writes it as JSON")
    options = parser.parse_args(arguments)
    try:
        name, storage = (
            choices.optimizer("--optimizer", options.optimizer),
            choices.storage(options.storage),
        )
        check_precision(options.precision)
        check_rate(options.learning_rate)
        check_extras(["flax"], "demo")
    except ValueError as error:
        parser.error(str(error))
    from adam_jax._cli.setting import shapes

    tx = choices.factory(name, storage, options.precision)(options.learning_rate)
    found = adam_jax.describe(tx, shapes(PRECISIONS[options.precision][0]))
    if options.json:
        sys.stdout.write(json.dumps({"optimizer": str(tx)} | found.as_dict(), indent=2) + "\n")
    else:
        sys.stdout.write(f"{tx}\n\n")
        show_drawing(found)
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Shows what is installed here, and whether it works."""
    parser = Parser(
        prog="adam_jax doctor",
        description="Shows the versions, the machine, JAX's devices and what else is installed, "
        "then takes a few steps and checks their numbers. Exits with 0 if all is "
        "well, with 1 if a check fails.",
    )
    parser.add_argument("--json", action="store_true", help="writes it as JSON")
    options = parser.parse_args(arguments)
    from adam_jax._cli.doctor import examine, show

    found = examine()
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        show(found)
    return 0 if all(check["ok"] for check in found["checks"]) else 1


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "describe": describe,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Without a command it trains, so that the shortest call shows the most.

    Returns:
      The exit status: 0, 1 if `doctor` found something wrong, or 130 if interrupted.

    Raises:
      SystemExit: with status 2, after one line on stderr, if an option or a file is wrong, before
        anything is trained. (A checkpoint that is damaged is found when its own run is about to go
        on.)
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a terminal without Greek letters still shows the rest
    command, *rest = given = list(sys.argv[1:] if arguments is None else arguments) or ["train"]
    if command.startswith("-"):
        return train(given)
    if command not in COMMANDS:
        Parser(prog="adam_jax").error(str(choices.unknown("command", command, COMMANDS)))
    return COMMANDS[command](rest)
