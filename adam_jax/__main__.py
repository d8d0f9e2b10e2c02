"""Runs the command line."""

import signal
import sys


def run() -> int:
    """Runs it, and ends quietly where it is interrupted or its output is read no further.

    Returns:
      The exit status; 130 where it is interrupted.
    """
    # A reader that has seen enough, such as `head`, ends it as it ends other commands.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        from adam_jax._cli.main import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
