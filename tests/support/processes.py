"""Python programs in processes of their own, which share one import of torch.

To import torch takes two seconds of processor time, and its compiler, which the first optimizer
imports, two more. Many tests need a process: for its environment, for a signal that kills it, or to
stand beside another. Here a server imports both once for all of them, and each program runs in a
fork of it, with an environment, folder, arguments and streams of its own. Tests of imports share a
process that has torch alone (:func:`forked`). A test of memory, of Triton's interpreter, which has
to be asked for before the compiler is imported, or of the start itself takes ``subprocess``.
"""

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Started:
    """A program under way, with the part of ``subprocess.Popen`` that tests need."""

    def __init__(self, process):
        self._process, self.pid = process, process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=280.0):
        """Its status, minus the number of the signal that ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} has not ended within {timeout} s")
        return self._process.exitcode

    def send_signal(self, number):
        # the server takes an ended child out of the table before it says that the child has ended
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@functools.cache
def installed():
    """Where Python looks for modules without PYTHONPATH, a script or what pytest adds."""
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    program = "import json, sys; print(json.dumps(sys.path[1:]))"
    command = [sys.executable, "-c", program]
    return json.loads(subprocess.run(command, env=bare, capture_output=True, check=True).stdout)


def start(*command, output=None, errors=None, env=None, cwd=ROOT):
    """Start ``python COMMAND...``: ``-c PROGRAM``, ``-m MODULE`` or a file, and its arguments.

    ``output`` and ``errors`` are paths that the streams are written to; both are dropped where
    there is none, and errors go with the output where only that is given.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    environment = dict(os.environ if env is None else env)
    output = os.devnull if output is None else output
    streams = [str(output), None if errors is None else str(errors)]
    path = [*environment.get("PYTHONPATH", "").split(os.pathsep), *installed()]
    arguments = (list(map(str, command)), streams, environment, path, str(cwd))
    process = context.Process(target=_program, args=arguments)
    process.start()
    return Started(process)


def run(*command, env=None, cwd=ROOT, timeout=280.0):
    """Run a program to its end; its status, output and errors as ``subprocess.run`` gives them."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = start(*command, output=output, errors=errors, env=env, cwd=cwd)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        texts = [path.read_text(errors="replace") for path in (output, errors)]
    return subprocess.CompletedProcess([sys.executable, *command], status, *texts)


# what comes first, torch, and then each program in a fork
_FORKS = """
import json, os, sys

first, *programs = json.loads(sys.argv[1])
exec(first)
import torch

for program in programs:
    child = os.fork()
    if child == 0:
        exec(program)
        break
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(1)
"""


def forked(*programs, first="", env=None):
    """What each of some programs prints, a line each.

    Each begins where a new process has run ``first`` and has imported torch: unlike those of
    :func:`run` it finds nothing else imported, torch's compiler neither.
    """
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, json.dumps([first, *programs])],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(programs), done.stdout
    return lines


def _program(command, streams, environment, path, folder):
    """What the fork does: become a new Python, as far as that can be."""
    for number, file in zip((1, 2), streams, strict=True):
        target = 1 if file is None else os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(target, number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # a shell's background job ignores interrupts, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    first, *rest = command
    own = folder if first in ("-c", "-m") else str(Path(first).parent)
    sys.path[:] = [own, *filter(None, path)]
    status = 0
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        elif first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def wait_until(condition, process, errors=None, seconds=280.0):
    """Wait for a condition while a program runs; ``errors``: the file of its errors."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            said = "" if errors is None else Path(errors).read_text()
            raise AssertionError(f"the process ended with {process.poll()}: {said}")
        assert time.monotonic() < end, "too slow"
        time.sleep(0.02)
