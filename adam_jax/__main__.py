"""Runs the command line."""

import os
import sys


def run() -> int:
    """Runs it, and ends quietly where it is interrupted or its output is read no further.

    Returns:
      The exit status: 130 where it is interrupted, 141 where the reader has gone, as a shell has
      them. (`head` goes when it has seen its lines.)
    """
    try:
        from adam_jax._cli.main import main

        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


if __name__ == "__main__":
    sys.exit(run())
