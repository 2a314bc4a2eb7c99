"""Starts several processes of one job on this machine, which connect over loopback.

    python launch/local.py 2 gptjax train configs/debug.py --run runs/two
    python launch/local.py --devices 2 4 gptjax train CONFIG ...    # two virtual devices each

Each output line begins with the number of its process. SIGTERM and Ctrl-C are forwarded to all
processes, the third one as SIGKILL. The exit code is 0 if that of all processes is, otherwise the
first one that is not 69 (a peer ended), otherwise 69.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import IO

PEER_ERROR = 69


def free_port() -> int:
    """A free port on loopback."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def environment(index: int, count: int, port: int, devices: int | None) -> dict[str, str]:
    """The environment of process `index` of `count`."""
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    if devices is not None:
        flag = f"--xla_force_host_platform_device_count={devices}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}".strip()
    return env


def forward(lines: IO[str], to: IO[str], index: int) -> None:
    """Copies a process's lines, prefixed by its number."""
    for line in lines:
        to.write(f"[{index}] {line}")
        to.flush()


def exit_code(codes: list[int]) -> int:
    """The job's exit code, from those of its processes; 128 plus the number for a signal."""
    codes = [128 - code if code < 0 else code for code in codes]
    return next((code for code in codes if code not in (0, PEER_ERROR)), max(codes))


def main() -> int:
    """Starts the processes, waits for them, and returns the job's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("processes", type=int)
    parser.add_argument("--devices", type=int, help="virtual CPU devices of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    args = parser.parse_args()
    if args.processes < 1 or not args.command:
        parser.error("give a number of processes, at least 1, and a command")
    port = free_port()
    children = [
        subprocess.Popen(
            args.command,
            env=environment(index, args.processes, port, args.devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that Ctrl-C reaches each process once, forwarded from here
        )
        for index in range(args.processes)
    ]

    received: list[int] = []

    def forward_signal(number: int, _: object) -> None:
        received.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number if len(received) < 3 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward_signal)
    copies = [
        threading.Thread(target=forward, args=(lines, to, index))
        for index, child in enumerate(children)
        for lines, to in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
    ]
    for copy in copies:
        copy.start()
    codes = [child.wait() for child in children]
    for copy in copies:
        copy.join()
    return exit_code(codes)


if __name__ == "__main__":
    sys.exit(main())
