"""Trains on the nodes of a Ray cluster, and starts again until the run is done.

    python launch/ray_job.py --processes 4 --gpus 8 -- \\
        configs/llama.py:llama3_8b --run /shared/run --data.store /shared/store
    python launch/ray_job.py --processes 64 --resource TPU=4 -- configs/pods.py:NAME ...

One actor on each node, each with one `gptjax train` process that has all of its node's
accelerators, as the three JAX_* variables tell it. On a TPU slice ask for its hosts, by --resource,
so that all are of one slice. All that follows `--` is given to `gptjax train`, on every node; --run
and --data.store lie on a path that all nodes see, and so do presets: give --cwd where they are
elsewhere than here. On SIGTERM and Ctrl-C all processes save at the same step and this ends with
75. `ray job stop` sends SIGTERM, and kills after RAY_JOB_STOP_WAIT_TIME_S (3) seconds: set 300 on
the head node.

Ray (2.40 or newer) is no dependency of gptjax: `pip install ray`.
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

# A lost peer, saved after SIGTERM, and ended by SIGABRT, SIGKILL, SIGTERM: worth another attempt.
AGAIN = frozenset({69, 75, 134, 137, 143})
SAVED = 75
LOST = 69  # an actor whose node is gone is a lost peer


def worst(codes: Iterable[int]) -> int:
    """The code to end with: a problem for a person before what a restart mends, that before 0.

    A process with bad data (65) makes its peers report a lost one (69): the cause counts.
    """
    return max(codes, key=lambda code: (code != 0, code not in AGAIN, code), default=0)


def exit_code(returned: int) -> int:
    """What a shell would say of a process: one that a signal ended is 128 and its number."""
    return 128 - returned if returned < 0 else returned


def environment(
    base: Mapping[str, str], coordinator: str, processes: int, process: int
) -> dict[str, str]:
    """The environment of one process of several, as JAX reads it."""
    return dict(base) | {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }


def command(program: str, words: Sequence[str]) -> list[str]:
    """What every node runs."""
    return [*shlex.split(program), "train", *words]


class Host:
    """Runs on a node: starts its process, hands on a stop, and tells how it ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def address(self) -> str:
        """Of this node, with a port that is free on it now: for the coordinator."""
        import ray

        with socket.socket() as taken:
            taken.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{taken.getsockname()[1]}"

    def run(self, words: Sequence[str], cwd: str, variables: Mapping[str, str]) -> int:
        """Runs the command to its end; its exit code."""
        with self._lock:
            if self._stopped:
                return SAVED
            self._process = subprocess.Popen(words, cwd=cwd, env=dict(os.environ) | variables)
        return exit_code(self._process.wait())

    def stop(self) -> None:
        """SIGTERM, at which all processes of the job save; before it began, it does not begin."""
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()


def attempt(actors: Any, words: Sequence[str], args: argparse.Namespace, told: list[int]) -> int:
    """Runs all processes to their ends; the worst of their codes."""
    import ray

    hosts = [actors.remote() for _ in range(args.processes)]
    try:
        address = hosts[0].address.remote()
        while not ray.wait([address], timeout=0.5)[0]:  # while the cluster has no room
            if told:
                return SAVED  # there was nothing yet
        coordinator = ray.get(address)
        pending = [
            host.run.remote(words, args.cwd, environment({}, coordinator, args.processes, process))
            for process, host in enumerate(hosts)
        ]
        codes, handed_on = [], False
        while pending:
            # Awake twice a second, for a signal to this process.
            done, pending = ray.wait(pending, timeout=0.5)
            for one in done:
                try:
                    codes.append(ray.get(one))
                except ray.exceptions.RayError as error:
                    print(f"ray_job: lost a process: {error}", file=sys.stderr)
                    codes.append(LOST)
            if told and not handed_on:
                handed_on = True
                for host in hosts:
                    host.stop.remote()
        return worst(codes)
    except ray.exceptions.RayError as error:
        print(f"ray_job: could not start: {error}", file=sys.stderr)
        return LOST
    finally:
        for host in hosts:
            ray.kill(host)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, and the words for `gptjax train`."""
    parser = argparse.ArgumentParser(description="Train on the nodes of a Ray cluster.")
    parser.add_argument("--processes", type=int, required=True, help="nodes, or TPU hosts")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a node, all of them")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs that Ray counts for each (1)")
    parser.add_argument(
        "--resource", metavar="NAME=N", default="", help="what else a process needs, as TPU=4"
    )
    parser.add_argument("--gptjax", default="gptjax", help="what to run, on each node (gptjax)")
    parser.add_argument("--cwd", default=os.getcwd(), help="where, on each node (here)")
    parser.add_argument("--restarts", type=int, default=1000, help="how often to begin again")
    parser.add_argument("words", nargs="+", metavar="CONFIG [OVERRIDES]")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes={args.processes}: must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; the exit code of the last attempt."""
    args = parse(sys.argv[1:] if argv is None else argv)
    import ray

    ray.init(log_to_driver=True)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
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
        code = attempt(actors, words, args, told)
        if code not in AGAIN or told or restarts == args.restarts:
            break
        print(f"ray_job: ended with {code}; begins again", file=sys.stderr)
        time.sleep(1)
    return code


if __name__ == "__main__":
    sys.exit(main())
