"""PyTorch's side of `benchmarks.step`, in a process of its own.

Two thread pools in one would fight over the cores.

It says on which device it runs, then answers every line "tree calls" with a JSON list of seconds.
In between it sleeps, so that nothing else runs while JAX is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks._trees import GRADIENT, TREES, WARM_UP


class TorchProcess:
    """The parent's end: starts the process, asks it, and ends it.

    Args:
      device: "cpu" or "cuda"; where PyTorch has no such device, `device` says what it took instead.
    """

    def __init__(self, device: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self.device = self._answer()

    def time_steps(self, tree: str, calls: int) -> list[float]:
        """Seconds of each of `calls` steps on fresh parameters."""
        assert self._process.stdin is not None
        print(tree, calls, file=self._process.stdin, flush=True)
        return self._answer()  # type: ignore[no-any-return]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the PyTorch process ended with exit status {self._process.wait()}; its error is "
                "above."
            )
        return json.loads(line)

    def __enter__(self) -> TorchProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()  # its input ends, and so does it


def _time_steps(tree: str, calls: int, device: str) -> list[float]:
    import torch

    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in TREES[tree]]
    for param in params:
        param.grad = torch.full_like(param, GRADIENT)
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds() -> float:
        finish()
        start = time.perf_counter()
        optimizer.step()
        finish()
        return time.perf_counter() - start

    return [seconds() for _ in range(WARM_UP + calls)][WARM_UP:]


def main() -> None:
    """Answers until its input ends."""
    import torch

    device = "cuda" if sys.argv[1] == "cuda" and torch.cuda.is_available() else "cpu"
    print(json.dumps(device), flush=True)
    for line in sys.stdin:
        tree, calls = line.split()
        print(json.dumps(_time_steps(tree, int(calls), device)), flush=True)


if __name__ == "__main__":
    main()
