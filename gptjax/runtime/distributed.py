"""Jobs of several processes: joining a job, agreeing within it, and leaving it.

The environment describes the job: through JAX's own detection (SLURM, Open MPI, TPU pods,
Kubernetes), or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Process 0 is the
coordinator: it alone writes logs and claims folders, and the others ask it for shared values. In a
single process every function here is trivial and free.
"""

import concurrent.futures
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

from gptjax.errors import ConfigError, MismatchError, PeerError, Preempted
from gptjax.runtime.preemption import Interrupted

_WAIT_MS = 7 * 24 * 3600 * 1000  # timeout of waiting for process 0; the watchdog ends it earlier
_JOIN_S = 1800  # timeout of waiting for all processes to join
_FIRST_REPORT_S, _NEXT_REPORT_S = 2, 60  # seconds until processes are said to be missing
_SHUTDOWN_S = 300  # timeout of waiting for all processes to end
_LEAVE_S = 30  # time to end with a verdict, before JAX aborts the process
_NO_LIMIT_S = 10**6
_INTERRUPTED = 130  # exit code after Ctrl-C

_uses = itertools.count()  # numbers barriers and keys, in the same order in every process


def join(lost: int, say: Callable[[str], None] = lambda line: None) -> None:
    """Joins the job that the environment describes, if there is one.

    A process without a heartbeat for `lost` seconds is dead (0: never). JAX's own limit is set well
    above that, because JAX ends a process without saying which one is at fault.

    Raises ConfigError for an incomplete environment, PeerError if processes do not join in time.
    """
    given = {name: os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
    try:
        count, own = (None if value is None else int(value) for value in given.values())
    except ValueError:
        raise ConfigError([f"{given}: must be integers"]) from None
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not address and (count is not None or own is not None):
        raise ConfigError(["JAX_NUM_PROCESSES, JAX_PROCESS_ID: JAX_COORDINATOR_ADDRESS is not set"])
    host, _, port = address.rpartition(":")
    loopback = host in ("127.0.0.1", "localhost", "[::1]")
    _readers.seconds = min(_readers.seconds, lost or _readers.seconds)
    if address:
        _explain_abort()
    try:
        with _report_waiting(f" at {address}" if address else "", say):
            _interruptible(
                jax.distributed.initialize,
                num_processes=count,
                process_id=own,
                # A coordinator on loopback must not be reachable from other machines.
                coordinator_bind_address=f"{host}:{port}" if loopback else None,
                initialization_timeout=_JOIN_S,
                heartbeat_timeout_seconds=3 * lost + _LEAVE_S if lost else _NO_LIMIT_S,
                shutdown_timeout_seconds=_SHUTDOWN_S,
            )
    except JaxRuntimeError as error:
        raise PeerError(f"the processes did not all join at {address}: {error}") from None
    except (ValueError, RuntimeError) as error:
        # A single process, or one that has already used its devices, as in a notebook.
        if address or not ("coordinator_address" in str(error) or "before any" in str(error)):
            raise ConfigError([f"the environment describes an incomplete job: {error}"]) from None
    else:
        _explain_abort()


def _interruptible(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls in another thread: the service waits without looking for signals."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(call, *args, **options).result()
        except (KeyboardInterrupt, Interrupted) as error:
            # Neither may go on from here: the thread would be waited for.
            if isinstance(error, Interrupted) and error.signal != signal.SIGINT:
                why = f"told to stop by {error.signal.name} while it waited for the others"
                print(f"gptjax: {why}", file=sys.stderr)
                leave(Preempted.exit_code, f"{name()}: {why}")
            print("gptjax: interrupted", file=sys.stderr)
            sys.stderr.flush()
            os._exit(_INTERRUPTED)


@contextmanager
def _report_waiting(where: str, say: Callable[[str], None]) -> Iterator[None]:
    """While entered, says that processes are missing: soon, and then every minute."""
    joined = threading.Event()

    def tell() -> None:
        began, wait = time.monotonic(), _FIRST_REPORT_S
        while not joined.wait(wait):
            minutes = round((time.monotonic() - began) / 60)
            so_far = f", for {minutes} min" if minutes else ""
            say(f"waiting for the other processes to join{where}{so_far} (at most {_JOIN_S} s)")
            wait = _NEXT_REPORT_S

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        joined.set()
        thread.join()


def client() -> Any:
    """The client of JAX's coordination service, a key-value store without a public name in JAX."""
    return service.global_state.client


def index() -> int:
    """Number of this process; available before any device is initialised."""
    return service.global_state.process_id


def count() -> int:
    """Number of processes of the job."""
    return service.global_state.num_processes or 1


def several() -> bool:
    """Whether the job has more than one process."""
    return count() > 1


def first() -> bool:
    """Whether this is process 0, which writes logs and claims folders for the job."""
    return index() == 0


def name() -> str:
    """Name of this process in messages: its number, process id and host."""
    return f"process {index()} ({os.getpid()} on {socket.gethostname()})"


# --- agreeing ------------------------------------------------------------------------------------


def barrier() -> None:
    """Waits until every process has reached this call."""
    if several():
        _interruptible(client().wait_at_barrier, f"gptjax/barrier/{next(_uses)}", _WAIT_MS)


def from_first(value: str) -> str:
    """Broadcast: the `value` of process 0."""
    return from_process(0, value)


def from_process(process: int, value: str) -> str:
    """Broadcast: the `value` of a process."""
    if not several():
        return value
    key = f"gptjax/first/{next(_uses)}"
    if index() == process:
        client().key_value_set(key, value)
        return value
    return _interruptible(client().blocking_key_value_get, key, _WAIT_MS)


def first_of(problem: str | None) -> str | None:
    """The problem of the lowest-numbered process that has one, or None."""
    if not several():
        return problem
    folder = f"gptjax/problems/{next(_uses)}/"
    if problem is not None:
        client().key_value_set(f"{folder}{index():09}", problem)
    barrier()
    return next((text for _, text in sorted(client().key_value_dir_get(folder))), None)


def gather(value: str) -> list[str]:
    """The values of all processes, in the order of their numbers."""
    if not several():
        return [value]
    folder = f"gptjax/gathered/{next(_uses)}/"
    client().key_value_set(f"{folder}{index():09}", value)
    barrier()
    return [text for _, text in sorted(client().key_value_dir_get(folder))]


@contextmanager
def first_before_others() -> Iterator[None]:
    """Process 0 runs the body before any other process does."""
    if not first():
        barrier()
    yield
    if first():
        barrier()


def agree(facts: Mapping[str, str]) -> None:
    """Raises MismatchError with the facts that differ between this process and process 0."""
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

_VERDICT = "gptjax/verdict/"  # the reason why the job ends
_READ = "gptjax/read/"  # the processes that have read it
_leaving = threading.Lock()  # never released


@dataclass
class _Readers:
    """Time that process 0 waits for the others to read a verdict; JAX aborts them when it ends."""

    seconds: float = 8.0


_readers = _Readers()


def leave(code: int, why: str) -> None:
    """Posts the reason to the other processes and ends this one at once, with an exit code.

    A normal interpreter exit would wait for the others, and they for this one. Does nothing in a
    single process. If several threads call it, the first one ends the process.
    """
    if not several():
        return
    _leaving.acquire()
    try:
        if verdict() is None:
            client().key_value_set(f"{_VERDICT}{index()}", why)
        client().key_value_set(f"{_READ}{index()}", "")
        deadline = time.monotonic() + _readers.seconds
        while first() and time.monotonic() < deadline:
            if len(client().key_value_dir_get(_READ)) == count():
                deadline = min(deadline, time.monotonic() + 1)  # the readers end within this
            time.sleep(0.1)
    except Exception as error:  # the coordinator cannot be reached
        print(f"gptjax: could not notify the other processes: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def verdict() -> str | None:
    """The reason why the job ends, once a process has posted one."""
    return next((why for _, why in client().key_value_dir_get(_VERDICT)), None)


_ABORTED = b"""gptjax: JAX has aborted this process for the reason above. If that is an error of the
coordination service, then process 0, which runs it, is dead or unreachable; run the job again
"""


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
    os.write(2, _ABORTED)


def _explain_abort() -> None:
    """Adds a sentence to JAX's abort by a C signal handler, since Python's would not run."""
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
