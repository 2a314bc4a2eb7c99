"""Commands of gptjax in real processes that start at once.

Python with JAX and TensorFlow takes 10 to 20 s of a core to start. These processes are forked from
a server that has imported all of it, and has not used a device.
"""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOADED = [
    *("gptjax.cli.main", "gptjax.cli.train", "gptjax.cli.finetune", "gptjax.pretrain.train"),
    *("gptjax.finetune.train", "gptjax.load_model", "orbax.checkpoint", "tensorflow"),
]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_USE_LEGACY_KERAS": "1",  # as import_tensorflow has it
    "XLA_FLAGS": "",
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",  # of killed ones
}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def _start_server() -> None:
    from multiprocessing.forkserver import ensure_running

    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _child(
    words: Sequence[str], cwd: Path, outputs: tuple[Path, Path], environment: Mapping[str, str],
    prepare: Any,
) -> None:  # fmt: skip
    # The server may have begun within a test that had another bucket.
    os.environ.pop("TENSORSTORE_GCS_HTTP_URL", None)
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in zip((1, 2), outputs, strict=True):
        with path.open("a") as stream:
            os.dup2(stream.fileno(), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server has it ignored
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    from gptjax.cli import main

    prepare()
    sys.argv = ["gptjax", *words]
    sys.exit(main.main(words))


def nothing() -> None:
    """Prepares nothing."""


class Forked:
    """`gptjax WORDS` in a process of its own, with the interface of subprocess.Popen.

    `output` and `errors` are files that it appends to, which may be the same one. `prepare` is
    called in it before the command, and can be pickled. Environment variables that JAX reads when
    it is imported have no effect.
    """

    def __init__(
        self,
        words: Sequence[str],
        cwd: Path,
        output: Path,
        errors: Path,
        prepare: Any = nothing,
        **environment: str,
    ) -> None:
        _start_server()
        self.errors = errors
        errors.touch()
        arguments = (list(words), cwd, (output, errors), environment, prepare)
        self._process = _context.Process(target=_child, args=arguments)
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """The exit code, minus the signal's number for a killed process; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; the exit code. Raises subprocess.TimeoutExpired, and shows where the
        process is then."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            self.send_signal(signal.SIGUSR2)
            self._process.join(2)
            print(self.read(), file=sys.stderr)
            raise subprocess.TimeoutExpired("gptjax", timeout or 0, None, self.read().encode())
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal, if the process runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL, if the process runs."""
        self.send_signal(signal.SIGKILL)

    def read(self) -> str:
        """What it has written to standard error."""
        return self.errors.read_text()
