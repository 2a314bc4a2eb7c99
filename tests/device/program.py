"""Checks and measures gptjax on one accelerator in ten minutes.

    python tests/device/program.py --out results
    python tests/device/program.py --out results --toy        # small, and on CPUs too
    python tests/device/program.py --out results --nanogpt nanoGPT --parts train peer

Parts run in the order of PARTS, each in a process of its own with a time limit, so that what went
before is kept whatever happens. A part appends rows to OUT/NAME.jsonl as it goes; at the end all
are printed as a table, and written to OUT/results.json with the device and the versions. The exit
code is 1 if a check failed or a part did not end.

Needs JAX with its accelerator's plugin, flax, optax, orbax-checkpoint, tensorstore and what they
require; torch and transformers for the comparisons. TensorFlow, tyro and tensorboardX are not
needed: training reads tokens from memory. Nothing is downloaded.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = {  # seconds at most
    "correctness": 110,
    "train gpt2": 75,
    "peer gpt2": 75,
    "train llama": 75,
    "train llama-masked": 60,
    "train gpt2-masked": 50,
    "train mixture": 60,
    "decoding": 100,
    "peer decoding": 60,
    "bits": 90,
    "trace": 50,
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "transformers")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--toy", action="store_true", help="small sizes, to try the program")
    parser.add_argument("--parts", nargs="+", default=[], help="beginnings of their names")
    parser.add_argument("--seconds", type=float, default=570, help="for all parts together")
    parser.add_argument("--nanogpt", default="", help="folder with nanoGPT's model.py, the peer")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(name: str, args: argparse.Namespace) -> None:
    """Runs one part in this process."""
    from rows import Rows

    part, _, which = name.partition(" ")
    rows = Rows(args.out / f"{name}.jsonl", name)
    if part == "correctness":
        import correctness

        correctness.run(rows, toy=args.toy)
    elif part == "train":
        import training

        training.run(rows, which, toy=args.toy, folder=args.out)
    elif part == "peer":
        import peers

        peers.run(rows, which, toy=args.toy, nanogpt=args.nanogpt)
    elif part == "decoding":
        import decoding

        decoding.run(rows, toy=args.toy)
    elif part == "bits":
        import bits

        bits.run(rows, toy=args.toy, folder=args.out)
    else:
        import trace_gaps

        trace_gaps.run(rows, toy=args.toy, folder=args.out)


def run_part(name: str, args: argparse.Namespace, limit: float) -> dict[str, object]:
    """Runs a part in a process of its own; says how it ended."""
    words = [sys.executable, __file__, "--out", str(args.out), "--child", name]
    words += ["--toy"] * args.toy + ["--nanogpt", args.nanogpt] * bool(args.nanogpt)
    log = args.out / f"{name}.log"
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ
    env["PYTHONPATH"] = f"{HERE.parents[1]}:{env.get('PYTHONPATH', '')}"
    began = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                words, stdout=file, stderr=subprocess.STDOUT, timeout=limit, env=env
            ).returncode
            ended = "ok" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {limit:.0f} s"
    seconds = time.monotonic() - began
    print(f"{name}: {ended}, {seconds:.0f} s", flush=True)
    if ended != "ok":
        print("".join(f"    {line}\n" for line in log.read_text().splitlines()[-8:]), flush=True)
    return {"part": name, "ended": ended, "seconds": round(seconds, 1)}


def table(rows: list[dict]) -> str:
    """The rows in columns."""
    lines = []
    for row in rows:
        value = row["value"]
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        verdict = "" if row["ok"] is None else "ok" if row["ok"] else "FAILED"
        bound = "" if row["bound"] is None else f"at most {row['bound']:g}"
        lines.append(
            f"{row['part']:20} {row['name']:52} {text:>14} {row['unit']:9} {bound:14} {verdict}"
        )
    return "\n".join(lines)


def main() -> int:
    args = parse_args()
    args.out = args.out.absolute()
    if args.child:
        child(args.child, args)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.seconds
    ends = []
    for name, limit in PARTS.items():
        if args.parts and not name.startswith(tuple(args.parts)):
            continue
        (args.out / f"{name}.jsonl").unlink(missing_ok=True)
        limit = min(10 * limit if args.toy else limit, until - time.monotonic())
        if limit < 5:
            ends.append({"part": name, "ended": "no time left", "seconds": 0})
            continue
        ends.append(run_part(name, args, limit))
    files = [args.out / f"{end['part']}.jsonl" for end in ends]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    results = {"versions": versions, "parts": ends, "rows": rows}
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(rows))
    failed = [row for row in rows if row["ok"] is False] + [e for e in ends if e["ended"] != "ok"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
