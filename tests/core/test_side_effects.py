"""The package evaluates no strings, unpickles nothing, opens no socket and writes no file.

The oracles are Python's audit hook, and the package's own source.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import adam_jax as aj

OPTIMIZED = True  # it computes for longer than it compiles
PACKAGE = Path(aj.__file__).parent
USE = '''
import sys, os, json
import jax, jax.numpy as jnp, numpy as np, optax, optax.contrib
jax.jit(lambda x: x + 1)(1.0)  # whatever JAX opens for itself, it has opened

PACKAGE = sys.argv[1]
found, listening = [], True

def ours(frame):
    return frame.f_code.co_filename.startswith(PACKAGE)

def hook(event, args):
    if not listening:
        return
    if event == "open":
        mode, flags = args[1] or "", args[2] or 0
        bad = set(str(mode)) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    elif event in ("compile", "exec"):
        # NamedTuple and dataclass make their methods so: called by the package, not in it
        bad = ours(sys._getframe(1))
    elif event.startswith("sys._getframe") or event.startswith("object."):
        return
    else:
        modules = "socket", "pickle", "marshal", "subprocess", "urllib", "ctypes", "shutil"
        calls = "system", "exec", "posix_spawn", "fork", "remove", "rename", "mkdir", "rmdir"
        first, _, call = event.partition(".")
        bad = first in modules or (first == "os" and call in calls)
        bad = bad and event != "marshal.loads"  # importing
    frame = sys._getframe(1) if bad else None
    while frame is not None:
        if ours(frame):
            found.append(event)
            return
        frame = frame.f_back

sys.addaudithook(hook)
import adam_jax as aj

params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3, jnp.bfloat16)}
from adam_jax.stages import average_parameters, cautious, clip_update_rms
links = (cautious(), clip_update_rms(), aj.round_stochastically(), average_parameters(0.9))
for name in aj.family.__all__:
    tx = aj.chain(getattr(aj, name)(0.1), *links)
    state = tx.init(params)
    step = jax.jit(tx.update) if name == "adam" else lambda *args: jax.eval_shape(tx.update, *args)
    step(params, state, params)
    repr(tx), hash(tx), tx == tx.stages[0], str(aj.state_bytes(tx, params))
    aj.hyperparameters(state, tx), aj.stages.averaged_parameters(state)
    try:
        tx.update({"w": jnp.ones(3)}, state, params)
    except ValueError:
        pass
said = list(found)
control = """
import io, os, pickle, socket, fractions
data = pickle.dumps(fractions.Fraction(1, 2))
writes, evaluates = lambda: open(os.devnull, 'w').close(), lambda: eval('1')
for act in (writes, evaluates, lambda: pickle.loads(data), lambda: socket.socket().close()):
    act()
"""
act = compile(control, PACKAGE + "/planted.py", "exec")
exec(act)
listening = False
print(json.dumps({"said": said, "control": found[len(said):]}))
'''


def test_it_evaluates_no_string_unpickles_nothing_opens_no_socket_and_writes_no_file():
    """Python's own audit hook listens while every member is imported, made, run and printed."""
    command = [sys.executable, "-B", "-c", USE, str(PACKAGE)]
    # JAX's compilation cache is a file, and would be written while the package calls.
    environment = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    }
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    heard = json.loads(done.stdout.splitlines()[-1])
    assert heard["said"] == []
    assert {"open", "compile", "exec", "pickle.find_class", "socket.__new__"} <= set(
        heard["control"]
    )


NEVER = {
    "eval", "exec", "compile", "__import__", "open", "pickle", "marshal", "shelve", "dill",
    "joblib", "socket", "ssl", "http", "urllib", "requests", "subprocess", "ctypes", "system",
    "popen", "write_text", "write_bytes",
}  # fmt: skip
ASKED = {"options.py": {"open"}, "data.py": {"open"}}
"""What a user asks for: the demo's figure, whose file is opened before the work is done, and its
data."""


def test_its_source_names_none_of_that():
    for path in sorted(PACKAGE.rglob("*.py")):
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {part for alias in node.names for part in alias.name.split(".")}
            elif isinstance(node, ast.ImportFrom):
                named |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            elif isinstance(node, ast.Name):
                named.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr != "compile":  # of a jitted function
                named.add(node.attr)
        assert named & NEVER == ASKED.get(path.name, set()), path
