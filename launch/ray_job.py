"""Trains on the nodes of a Ray cluster, and restarts until the run is done.

    python launch/ray_job.py --processes 4 --gpus 8 -- \\
        configs/llama.py:llama3_8b --run /shared/run --data.store /shared/store
    python launch/ray_job.py --processes 64 --resource TPU=4 -- configs/pods.py:NAME ...

Each node runs one actor with one `gptjax train` process, which uses all accelerators of its node
and joins the job by the three JAX_* variables. On a TPU slice request its hosts with --resource, so
that all are of one slice. The arguments after `--` are those of `gptjax train` on every node.
Presets, --run and --data.store must be on a file system that all nodes share; --cwd sets the
working directory. On SIGTERM and Ctrl-C all processes save at the same step, and this ends with 75.
`ray job stop` sends SIGTERM, and kills after RAY_JOB_STOP_WAIT_TIME_S (3) seconds: set 300 on the
head node.

Ray (2.40 or newer) is not a dependency of gptjax: `pip install ray`.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# A dead or hung peer, saved after SIGTERM, ended by SIGABRT, SIGKILL, SIGTERM: worth a restart.
RESTART_CODES = frozenset({69, 75, 134, 137, 143})
PREEMPTED = 75
PEER_ERROR = 69  # also of an actor whose node has failed


def worst(codes: Iterable[int]) -> int:
    """The job's exit code: a permanent error before one that a restart fixes, and that before 0.

    A process with bad data (65) makes its peers report a dead one (69); the cause takes precedence.
    """
    return max(codes, key=lambda code: (code != 0, code not in RESTART_CODES, code), default=0)


def exit_code(returned: int) -> int:
    """A process's exit code as in a shell: 128 plus the number for a signal."""
    return 128 - returned if returned < 0 else returned


def environment(
    base: Mapping[str, str], coordinator: str, processes: int, process: int
) -> dict[str, str]:
    """The environment from which JAX knows one process of several."""
    return dict(base) | {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }


def command(program: str, words: Sequence[str]) -> list[str]:
    """The command that each node runs."""
    return [*shlex.split(program), "train", *words]


class Host:
    """An actor on a node: starts its process, forwards a stop, and returns the exit code."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def address(self) -> str:
        """This node's address with a free port, for the coordinator."""
        import ray

        with socket.socket() as taken:
            taken.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{taken.getsockname()[1]}"

    def run(self, words: Sequence[str], cwd: str, variables: Mapping[str, str]) -> int:
        """Runs the command; returns its exit code."""
        with self._lock:
            if self._stopped:
                return PREEMPTED
            self._process = subprocess.Popen(words, cwd=cwd, env=dict(os.environ) | variables)
        return exit_code(self._process.wait())

    def stop(self) -> None:
        """Sends SIGTERM, at which all processes save; a process not yet started is not started."""
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()


def attempt(
    actors: Any, words: Sequence[str], args: argparse.Namespace, received: list[int]
) -> int:
    """Runs all processes once; returns the worst of their exit codes.

    `received` are the signals that this process has received.
    """
    import ray

    hosts = [actors.remote() for _ in range(args.processes)]
    try:
        address = hosts[0].address.remote()
        while not ray.wait([address], timeout=0.5)[0]:  # until the cluster has resources
            if received:
                return PREEMPTED  # nothing was started yet
        coordinator = ray.get(address)
        pending = [
            host.run.remote(words, args.cwd, environment({}, coordinator, args.processes, process))
            for process, host in enumerate(hosts)
        ]
        codes, forwarded = [], False
        while pending:
            # Wakes up twice a second to notice a signal to this process.
            done, pending = ray.wait(pending, timeout=0.5)
            for one in done:
                try:
                    codes.append(ray.get(one))
                except ray.exceptions.RayError as error:
                    print(f"ray_job: a process died: {error}", file=sys.stderr)
                    codes.append(PEER_ERROR)
            if received and not forwarded:
                forwarded = True
                for host in hosts:
                    host.stop.remote()
        return worst(codes)
    except ray.exceptions.RayError as error:
        print(f"ray_job: could not start: {error}", file=sys.stderr)
        return PEER_ERROR
    finally:
        for host in hosts:
            ray.kill(host)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, and the arguments of `gptjax train`."""
    parser = argparse.ArgumentParser(description="Train on the nodes of a Ray cluster.")
    parser.add_argument("--processes", type=int, required=True, help="nodes, or TPU hosts")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a node, all of them")
    parser.add_argument(
        "--cpus", type=float, default=1, help="CPUs that Ray reserves for each process (1)"
    )
    parser.add_argument(
        "--resource",
        metavar="NAME=N",
        default="",
        help="another resource of each process, such as TPU=4",
    )
    parser.add_argument("--gptjax", default="gptjax", help="program to run on each node (gptjax)")
    parser.add_argument(
        "--cwd", default=os.getcwd(), help="working directory on each node (this one)"
    )
    parser.add_argument(
        "--restarts", type=int, default=1000, help="largest number of restarts (1000)"
    )
    parser.add_argument("words", nargs="+", metavar="CONFIG [OVERRIDES]")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes={args.processes}: must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Trains with restarts; returns the exit code of the last attempt."""
    args = parse(sys.argv[1:] if argv is None else argv)
    import ray

    ray.init(log_to_driver=True)
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    name, _, amount = args.resource.partition("=")
    actors = ray.remote(Host).options(
        num_cpus=args.cpus,
        num_gpus=args.gpus,
        resources={name: float(amount)} if name else None,
        scheduling_strategy="SPREAD",
        max_concurrency=2,  # stop() while run() waits
    )
    words = command(args.gptjax, args.words)
    for restarts in range(args.restarts + 1):
        code = attempt(actors, words, args, received)
        if code not in RESTART_CODES or received or restarts == args.restarts:
            break
        print(f"ray_job: ended with {code}; restarting", file=sys.stderr)
        time.sleep(1)
    return code


if __name__ == "__main__":
    sys.exit(main())
