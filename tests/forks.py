"""Functions in real processes of their own that share one import: forked from a server in which JAX has not started.

A process that starts Python and imports lcm_jax, transformers and their like takes five seconds for that alone.
"""

import atexit
import multiprocessing
import os
import pathlib
import sys
import tempfile

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lcm_jax.train", "lcm_jax.export", "lcm_jax.sample", "transformers.models.clip"])


class Fork:
    """A started process, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, function, *arguments, flags):
        """Calls `function(*arguments)`, which returns the exit code, under these XLA_FLAGS and the environment of now.

        The function must be importable, as that of a test module is.
        """
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self._output = pathlib.Path(file.name)
        environment = {**os.environ, "XLA_FLAGS": flags}
        self._process = _CONTEXT.Process(target=_call, args=(environment, str(self._output), function, arguments))
        self._process.start()

    @property
    def returncode(self):
        """The exit code, the negative signal, or None while it runs."""
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def kill(self):
        self._process.kill()

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def communicate(self, timeout=240):
        """Waits for its end; returns its output and errors together."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            self._process.join()
        output = self._output.read_text()
        self._output.unlink()
        return output


def _call(environment, output, function, arguments):
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    code = function(*arguments)
    atexit._run_exitfuncs()  # as at the end of a program; a process of multiprocessing leaves them out
    sys.exit(code)


def command(name, argv):
    """Runs a command of lcm_jax as its command line does."""
    import importlib

    from lcm_jax import cli

    return cli.run(importlib.import_module(f"lcm_jax.{name}").main, argv, name)
