"""A job of several processes: joining it, agreeing within it, and leaving it.

The environment says that there is one: JAX's own detection (SLURM, Open MPI, TPU pods, Kubernetes),
or JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID. Process 0 coordinates: it
alone writes logs and claims folders, and what the others must know they ask it for. In a process
that is alone each function here does the obvious and costs nothing.
"""

import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import distributed as service
from jax.errors import JaxRuntimeError

from gptjax.errors import ConfigError, MismatchError, PeerError

_PATIENCE_MS = 7 * 24 * 3600 * 1000  # for what process 0 does first; a watch ends it if it is lost
_MEETING_S = 1800  # that a job waits for its last process to come
_SHUTDOWN_S = 300  # and the first to end for the last
_LEAVING_S = 30  # within which who has a verdict has ended; JAX's own end, an abort, comes after it
_FOR_EVER_S = 10**6

_uses = itertools.count()


def join(lost: int, say: Callable[[str], None] = lambda line: None) -> None:
    """Joins the job that the environment describes, if it describes one.

    `lost` is after how many seconds of silence a process counts as lost, 0 for never. JAX's own
    limit is well above that: it ends a process without a word of whose fault it was, so it comes
    second.

    Raises ConfigError where the environment says only half, PeerError where they do not meet.
    """
    given = {name: os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
    try:
        count, own = (None if value is None else int(value) for value in given.values())
    except ValueError:
        raise ConfigError([f"{given}: must be numbers"]) from None
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not address and (count is not None or own is not None):
        raise ConfigError(["JAX_NUM_PROCESSES, JAX_PROCESS_ID: JAX_COORDINATOR_ADDRESS is missing"])
    if address:
        say(f"waiting for the other processes, which meet at {address}")
    host, _, port = address.rpartition(":")
    loopback = host in ("127.0.0.1", "localhost", "[::1]")
    _readers.seconds = min(_readers.seconds, lost or _readers.seconds)
    if address:
        _tell_of_an_abort()
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=own,
            # Where the meeting place is this machine only, nobody else is to come near it.
            coordinator_bind_address=f"{host}:{port}" if loopback else None,
            initialization_timeout=_MEETING_S,
            heartbeat_timeout_seconds=3 * lost + _LEAVING_S if lost else _FOR_EVER_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except JaxRuntimeError as error:
        raise PeerError(f"the processes did not meet at {address}: {error}") from None
    except (ValueError, RuntimeError) as error:
        # A process alone; or one whose devices are in use already, as in a notebook.
        if address or not ("coordinator_address" in str(error) or "before any" in str(error)):
            raise ConfigError([f"the environment describes half a job: {error}"]) from None
    else:
        _tell_of_an_abort()


def client() -> Any:
    """The coordination service's key-value store; JAX has no public name for it."""
    return service.global_state.client


def index() -> int:
    """Number of this process; asks no device, so it can be had before there is one."""
    return service.global_state.process_id


def count() -> int:
    """Processes of the job."""
    return service.global_state.num_processes or 1


def several() -> bool:
    """Whether there are other processes."""
    return count() > 1


def first() -> bool:
    """Whether this is process 0, which speaks for the job."""
    return index() == 0


def name() -> str:
    """This process, for a person: its number, its host and its id there."""
    return f"process {index()} ({os.getpid()} on {socket.gethostname()})"


# --- agreeing ------------------------------------------------------------------------------------


def barrier() -> None:
    """Waits until every process is here."""
    if several():
        client().wait_at_barrier(f"gptjax/barrier/{next(_uses)}", _PATIENCE_MS)


def from_first(value: str) -> str:
    """What process 0 has for `value`."""
    if not several():
        return value
    key = f"gptjax/first/{next(_uses)}"
    if first():
        client().key_value_set(key, value)
        return value
    return client().blocking_key_value_get(key, _PATIENCE_MS)


def first_of(problem: str | None) -> str | None:
    """The problem of the first process that has one, or None."""
    if not several():
        return problem
    folder = f"gptjax/problems/{next(_uses)}/"
    if problem is not None:
        client().key_value_set(f"{folder}{index():09}", problem)
    barrier()
    return next((text for _, text in sorted(client().key_value_dir_get(folder))), None)


@contextmanager
def first_before_others() -> Iterator[None]:
    """Process 0 goes through the body before any other does."""
    if not first():
        barrier()
    yield
    if first():
        barrier()


def agree(facts: Mapping[str, str]) -> None:
    """Raises MismatchError where this process has other facts than process 0, naming them."""
    theirs = json.loads(from_first(json.dumps(dict(facts))))
    differences = [
        f"{what}: {own} here, {theirs.get(what)} in process 0"
        for what, own in facts.items()
        if own != theirs.get(what)
    ]
    if differences:
        raise MismatchError(f"{name()} differs from process 0", differences)
    barrier()


# --- leaving -------------------------------------------------------------------------------------

_VERDICT = "gptjax/verdict/"  # why the job ends, once it does
_READ = "gptjax/read/"  # by whom that was read
_leaving = threading.Lock()  # never given back


@dataclass
class _Readers:
    """How long process 0 waits for the others to read: when it goes, JAX aborts them."""

    seconds: float = 8.0


_readers = _Readers()


def leave(code: int, why: str) -> None:
    """Ends this process of several at once, with an exit code; a sentence tells the others why.

    Leaving the interpreter as usual would wait for them, and they for this one. In a process that
    is alone it does nothing. Of several threads that come here the first is the one that leaves.
    """
    if not several():
        return
    _leaving.acquire()
    try:
        if verdict() is None:
            client().key_value_set(f"{_VERDICT}{index()}", why)
        client().key_value_set(f"{_READ}{index()}", "")
        ends = time.monotonic() + _readers.seconds
        while first() and time.monotonic() < ends:
            if len(client().key_value_dir_get(_READ)) == count():
                ends = min(ends, time.monotonic() + 1)  # in which the readers end
            time.sleep(0.1)
    except Exception as error:  # there is nobody to tell
        print(f"gptjax: the other processes were not told: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def verdict() -> str | None:
    """Why the job ends, once a process has said so."""
    return next((why for _, why in client().key_value_dir_get(_VERDICT)), None)


_ABORTED = b"""gptjax: JAX has ended this process, for the reason above. Where that is an error of
the coordination service: process 0, which runs it, has died or cannot be reached; run the job again
"""


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
    os.write(2, _ABORTED)


def _tell_of_an_abort() -> None:
    """Adds a sentence to JAX's abort, which is C's and passes Python's handlers by."""
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
