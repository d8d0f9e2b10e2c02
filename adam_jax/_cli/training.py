"""`python -m adam_jax train`.

Reads the options, and trains the demo's network with each optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Sequence
from typing import Any

from adam_jax._cli import choices
from adam_jax._cli.choices import PRECISIONS
from adam_jax._cli.options import (
    EVERY,
    EXTRAS,
    check_devices,
    check_directories,
    check_extras,
    check_numbers,
    check_output,
    check_precision,
    describe_all,
    training_parser,
)


def train(arguments: Sequence[str]) -> int:
    """What is done without a command.

    Trains with every chosen optimizer, and shows how they did.
    """
    parser = training_parser()
    options = parser.parse_args(arguments)
    if options.list:
        sys.stdout.write(describe_all())
        return 0
    with contextlib.ExitStack() as opened:
        try:
            names = choices.optimizers("--optimizers", options.optimizers)
            storage = choices.storage(options.storage)
            check_precision(options.precision)
            check_numbers(options)
            check_output(options.output)
            check_extras(EXTRAS, "demo")
            check_devices(options.devices)
            from adam_jax._cli import demo, report
            from adam_jax._cli.data import digits, read
            from adam_jax._cli.setting import prepare

            data = digits() if options.data is None else read(options.data)
            sweeps = options.learning_rate is None
            dtype = PRECISIONS[options.precision][0]
            setting = prepare(
                data,
                options.steps,
                options.batch_size,
                options.seed,
                sweeps,
                dtype,
                options.devices,
            )
            check_directories(options, names)
            keepers: dict[str, Any] = {}
            if options.checkpoint_dir:
                keepers = {
                    name: opened.enter_context(_checkpoints_of(name, options, data))
                    for name in names
                }
        except ValueError as error:
            parser.error(str(error))
        try:
            with report.progress(names, options.steps * (1 + sweeps)) as tell:
                courses = {}
                # A run with checkpoints may be logged from a later one on, and these hold what was
                # observed.
                observed = bool(options.log_dir or options.checkpoint_dir)
                for name in names:
                    make, keeper = (
                        choices.factory(name, storage, options.precision, observed),
                        keepers.get(name),
                    )
                    with _events_of(name, options, keeper) as log:
                        told = functools.partial(tell, name)
                        courses[name] = demo.run(
                            make, setting, options.learning_rate, told, keeper, log
                        )
        except KeyboardInterrupt:
            sys.stderr.write(_how_to_go_on(options))
            return 130
        except ValueError as error:
            parser.error(str(error))
    report.show(courses, sweeps)
    source = "scikit-learn digits" if options.data is None else options.data.name
    try:
        report.draw(
            courses,
            options.output,
            f"{source}, batches of {options.batch_size}, seed {options.seed}",
        )
    except OSError as error:
        parser.error(f"--output: cannot write {str(options.output)!r}: {error.strerror}")
    sys.stdout.write(f"\nWrote {options.output}\n")
    if options.log_dir:
        sys.stdout.write(
            f"Events are in {options.log_dir}: tensorboard --logdir {options.log_dir}\n"
        )
    return 0


def _how_to_go_on(options: argparse.Namespace) -> str:
    if options.checkpoint_dir:
        return (
            "\nInterrupted. The same command with --resume goes on from the last checkpoint in "
            f"{options.checkpoint_dir}.\n"
        )
    return "\nInterrupted. With --checkpoint-dir DIR a run can be gone on with.\n"


def _checkpoints_of(name: str, options: argparse.Namespace, data: Any) -> Any:
    """The checkpoints of one optimizer's run, and all that its numbers follow from."""
    from adam_jax._cli.checkpoints import checkpoints
    from adam_jax._cli.data import fingerprint

    decisive = ("steps", "learning_rate", "batch_size", "seed", "storage", "precision", "devices")
    made_with = {key.replace("_", "-"): getattr(options, key) for key in decisive} | {
        "data": fingerprint(data)
    }
    return checkpoints(
        options.checkpoint_dir / name, made_with, options.checkpoint_every or EVERY, options.resume
    )


def _events_of(name: str, options: argparse.Namespace, keeper: Any) -> Any:
    """Where one optimizer's run is logged: from the start, or from where it goes on."""
    if not options.log_dir:
        return contextlib.nullcontext()
    from adam_jax._cli.events import events

    return events(
        options.log_dir / name, keeper.progress.steps[-1] + 1 if keeper and keeper.progress else 0
    )
