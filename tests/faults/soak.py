"""Faults at random, for as long as is asked: kills, signals, damage, full disks, lost connections.

python tests/faults/soak.py --minutes 60 --seed 1

Each trial is `gptjax train` on a small corpus in real processes, with a trained tokenizer,
accumulation, dropout, a moving average and asynchronous saves. After its faults the same command is
run once more, undisturbed. It must go on from the newest checkpoint that was committed, and end
with the bits of a run that nothing happened to. Where a file was damaged it may instead end with a
sentence and an exit code of gptjax, and must go on once the damage is undone. Anything else is
printed with its trial's number, and `--first NUMBER --trials 1` does that one again.

Processes are forked from a server that has imported what they need, so that each takes seconds.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked import Forked, nothing
from proxy import Proxy

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 12, 3
WORDS = [
    *("train", str(ROOT / "configs" / "debug.py"), "--run", "run", "--data.store", "store"),
    *("--data.sources", "text*.txt", "--data.valid-sources", "valid.txt", "--data.workers", "1"),
    *("--tokenizer.kind", "sentencepiece", "--tokenizer.vocab-size", "400"),
    *("--model.vocab-size", "400"),
    *("--train.tokens", str(STEPS * 1024), "--train.accumulation", "2", "--model.dropout", "0.1"),
    *("--train.ema-decay", "0.9", "--checkpoint.every", str(EVERY), "--checkpoint.keep", "2"),
    *("--eval.every", "6", "--eval.sample-tokens", "4", "--log.every", "1"),
    *("--log.tensorboard", "False", "--log.compile-cache", "", "--watch.lost", "6"),
]
TOLD = (2, 65, 69, 71, 73, 74, 78)  # exit codes of gptjax's own sentences
KINDS = {"kill": 5, "term": 2, "damage": 5, "disk": 2, "drop": 1}  # how often, of 15

# Where a signal is sent, a moment after a call: a module, and a name in it.
PLACES = {
    "tokenizer training": ("gptjax.data.prepare", "_tokenizer"),
    "preparation": ("gptjax.data.prepare", "_tokenize"),
    "end of preparation": ("gptjax.data.prepare", "_close"),
    "record": ("gptjax.checkpoint.run_dir", "record"),
    "restore": ("gptjax.checkpoint.checkpointer", "Checkpointer.restore_newest"),
    "save": ("gptjax.checkpoint.checkpointer", "Checkpointer.save"),
    "commit": ("gptjax.checkpoint.checkpointer", "Checkpointer._finish"),
    "retention": ("gptjax.data.store", "replace_file"),
}
STAGES = ("compile", "data", "step", "eval")  # of the watchdog


class Failure(Exception):
    """Something was lost or silently wrong, hangs, or ended in a traceback."""


@dataclass(frozen=True)
class Shot:
    """A signal that a process sends to itself `seconds` after the `nth` call at a place."""

    number: int
    place: str
    nth: int
    seconds: float

    @classmethod
    def draw(cls, rng: random.Random, number: int) -> "Shot":
        place = rng.choice([*PLACES, *STAGES])
        nth = rng.choice([1, 1, 2, 3, 4]) if place in (*STAGES, "save", "commit") else 1
        return cls(number, place, nth, 10 ** rng.uniform(-4, -0.3))

    def arm(self) -> None:
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1
            if calls == self.nth:
                threading.Timer(self.seconds, os.kill, (os.getpid(), self.number)).start()

        if self.place in STAGES:
            from gptjax.runtime.watchdog import Watchdog

            at = Watchdog.at
            Watchdog.at = lambda *a: (a[1] == self.place and count(), at(*a))[1]
            return
        module, name = PLACES[self.place]
        owner: Any = sys.modules[module]
        *classes, name = name.split(".")
        for one in classes:
            owner = getattr(owner, one)
        call = getattr(owner, name)
        setattr(owner, name, lambda *a, **k: (count(), call(*a, **k))[1])


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, and all that it wrote."""

    code: int
    text: str

    @property
    def told(self) -> bool:
        """Whether it ended with a sentence and an exit code of gptjax."""
        return self.code in TOLD and "\ngptjax: " in f"\n{self.text}"


def committed(folder: Path) -> int:
    """The step of the newest committed checkpoint; 0 if there is none."""
    marks = folder.glob("run/checkpoints/*/_CHECKPOINT_METADATA")
    return max((int(one.parent.name) for one in marks if one.parent.name.isdecimal()), default=0)


def outcome(folder: Path, ended: Ended) -> dict[str, Any]:
    """What must be the same however a run came to its end."""
    meta = json.loads((folder / f"run/checkpoints/{STEPS}/meta/data.json").read_text())
    same = {name: meta[name] for name in ("step", "fingerprints", "data", "tokens_seen", "rng")}
    return same | {"evaluation": re.findall(r'^\{"run".*', ended.text, re.MULTILINE)[-1]}


class Soak:
    """Runs trials in a folder, and knows how an undisturbed run ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: Counter[str] = Counter()  # by kind
        self.endings: Counter[str] = Counter()
        # What JAX compiles is kept for the other processes.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        self._logs = 0
        self._expected: dict[int, dict[str, Any]] = {}  # by the number of processes
        text = Path(os.__file__).read_text()
        clean = folder / "clean"
        clean.mkdir()
        for part in range(3):
            (clean / f"text{part}.txt").write_text(text[part * 12_000 :][:12_000])
        (clean / "valid.txt").write_text(text[36_000:][:4000])

    def copy(self, name: str, new: str = "trial") -> Path:
        """A new folder: "clean" has the text alone, "prepared" a store, "halfway" checkpoints."""
        source, folder = self.folder / name, self.folder / new
        if name != "clean" and not source.exists():
            self.copy("prepared" if name == "halfway" else "clean", name)
            place = ("save", 4) if name == "halfway" else ("record", 1)
            self.run(source, Shot(signal.SIGKILL, *place, 0))
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(source, folder))

    # --- processes ---

    def begin(self, folder: Path, shot: Shot | None = None, **more: str) -> Forked:
        """Starts a process, with more environment variables."""
        self._logs += 1
        log = self.folder / f"{self._logs}.log"
        return Forked(WORDS, folder, log, log, shot.arm if shot else nothing, **more)

    def end(self, process: Forked) -> Ended:
        """Waits for the end of a process. Raises Failure where it hangs or ends in a traceback."""
        try:
            code = process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failure(f"hangs:\n{process.read()}") from None
        text = process.read()
        process.errors.unlink()
        if "Traceback" in text:
            raise Failure(f"a traceback, exit code {code}:\n{text}")
        return Ended(code, text)

    def run(self, folder: Path, shot: Shot | None = None) -> Ended:
        """One process, from its beginning to its end."""
        return self.end(self.begin(folder, shot))

    def begin_pair(self, folder: Path, port: int, behind: int) -> list[Forked]:
        """A job of two processes; the second reaches the first at the port `behind`."""
        begun = []
        for index, to in enumerate((port, behind)):
            names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{to}", "JAX_NUM_PROCESSES": "2"}
            begun.append(self.begin(folder, None, JAX_PROCESS_ID=str(index), **names))
        return begun

    def run_job(self, folder: Path, processes: int) -> list[Ended]:
        """A job of one or two processes, from its beginning to its end."""
        if processes == 1:
            return [self.run(folder)]
        with Proxy() as proxy:
            return [self.end(one) for one in self.begin_pair(folder, proxy.to, proxy.port)]

    # --- judging ---

    def expected(self, processes: int) -> dict[str, Any]:
        """The outcome of an undisturbed job of so many processes."""
        if processes not in self._expected:
            folder = self.copy("clean", f"whole{processes}")
            ended = self.run_job(folder, processes)
            if any(one.code for one in ended):
                raise Failure(f"undisturbed: {[one.code for one in ended]}\n{ended[0].text}")
            self._expected[processes] = outcome(folder, ended[0])
        return self._expected[processes]

    def finish(self, folder: Path, newest: int, processes: int = 1) -> str:
        """Runs the command undisturbed; raises Failure unless it ends as it should."""
        ended = self.run_job(folder, processes)
        self.check(folder, ended, newest)
        return ended[0].text

    def check(self, folder: Path, ended: list[Ended], newest: int) -> None:
        """Raises Failure unless a job went on from `newest` (0: from anywhere) to the same end."""
        text = ended[0].text
        if any(one.code for one in ended):
            raise Failure(f"exit codes {[one.code for one in ended]}:\n{text}")
        if newest and f"resumed after step {newest} of" not in text:
            raise Failure(f"checkpoint {newest} was there, and not resumed from:\n{text}")
        if outcome(folder, ended[0]) != self.expected(len(ended)):
            raise Failure(f"other bits at the end:\n{text}")
        left = [path.name for path in (folder / "run/checkpoints").iterdir()]
        if left := [name for name in left if not re.fullmatch(r"\d+(\.corrupt-\d+)?", name)]:
            raise Failure(f"left in the run: {left}")

    # --- trials ---

    def signals(self, rng: random.Random, number: int) -> str:
        """Up to four signals to a run, at places of its whole life."""
        folder = self.copy(rng.choice(["clean", "clean", "prepared", "halfway"]))
        kind = "kill" if number == signal.SIGKILL else "term"
        newest = committed(folder)
        for _ in range(rng.randint(1, 4)):
            shot = Shot.draw(rng, number)
            ended = self.run(folder, shot)
            reached = ended.code in (-signal.SIGKILL, -signal.SIGTERM, 75)
            if not reached and ended.code:
                raise Failure(f"{shot}: exit code {ended.code}:\n{ended.text}")
            if newest and "resumed" in ended.text and f"after step {newest} of" not in ended.text:
                raise Failure(f"checkpoint {newest} was there, and not resumed from:\n{ended.text}")
            self.faults[kind] += reached
            if committed(folder) < newest:
                raise Failure(f"{shot}: checkpoint {newest} is gone:\n{ended.text}")
            newest = committed(folder)
        self.finish(folder, newest)
        return "bit-exact"

    def damage(self, rng: random.Random) -> str:
        """A flipped bit, a cut, zeros or a missing file, in every kind of file of a run."""
        folder = self.copy("halfway")
        kinds: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.stat().st_size:
                kinds.setdefault(re.sub(r"[\da-f]{6,}|\d+", "0", str(path)), []).append(path)
        path = rng.choice(kinds[rng.choice(sorted(kinds))])
        before = path.read_bytes()
        what = rng.choice(["flip", "flip", "flip", "cut", "zeros", "missing"])
        place = rng.randrange(len(before))
        flipped = bytes([before[place] ^ 1 << rng.randrange(8)])
        path.write_bytes(
            {
                "flip": before[:place] + flipped + before[place + 1 :],
                "cut": before[:place],
                "zeros": before[:place] + bytes(len(before) - place),
                "missing": b"",
            }[what]
        )
        if what == "missing":
            path.unlink()
        self.faults["damage"] += 1
        try:
            ended = self.run(folder)
            if not ended.code:
                self.check(folder, [ended], 0)
                return "bit-exact"
            if not ended.told:
                raise Failure(f"exit code {ended.code}:\n{ended.text}")
            path.write_bytes(before)
            self.finish(folder, committed(folder))
        except Failure as error:
            raise Failure(f"{what} in {path.relative_to(folder)} at {place}: {error}") from None
        return "told, and went on when undone"

    def disk(self, rng: random.Random) -> str:
        """A disk that is full after a number of bytes."""
        folder = self.copy(rng.choice(["clean", "prepared", "halfway"]))
        newest, space = committed(folder), int(10 ** rng.uniform(3, 6.5))
        with small_disk(folder) as resize:
            resize(space)
            ended = self.run(folder)
            resize(None)
            if not ended.code:
                self.check(folder, [ended], newest)
                return "bit-exact"
            self.faults["disk"] += 1
            if ended.code != 73:
                raise Failure(f"{space} bytes left: exit code {ended.code}:\n{ended.text}")
            self.finish(folder, max(newest, committed(folder)))
        return "told, and went on when undone"

    def drop(self, rng: random.Random) -> str:
        """Two processes of which one cannot reach the other any more."""
        self.expected(2)
        folder = self.copy("prepared")
        with Proxy() as proxy:
            begun = self.begin_pair(folder, proxy.to, proxy.port)
            proxy.drop_after(rng.uniform(2, 12))
            ended = [self.end(one) for one in begun]
        reached = any(one.code for one in ended)
        self.faults["drop"] += reached
        if reached and not {one.code for one in ended} <= {0, 69, -signal.SIGABRT}:
            raise Failure(f"{[one.code for one in ended]}:\n{ended[0].text}\n{ended[1].text}")
        self.finish(folder, committed(folder), 2)
        return "told, and went on when undone" if reached else "bit-exact"

    def trial(self, kind: str, rng: random.Random) -> None:
        """One trial; counts its ending. Raises Failure."""
        if kind in ("kill", "term"):
            number = signal.SIGKILL if kind == "kill" else signal.SIGTERM
            self.endings[self.signals(rng, number)] += 1
        else:
            self.endings[getattr(self, kind)(rng)] += 1


@contextmanager
def small_disk(folder: Path) -> Iterator[Any]:
    """Puts a folder's files on a file system in memory; `resize(n)` leaves n bytes free."""
    kept = folder.with_name("kept")
    folder.rename(kept)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", folder], check=True)
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)

        def resize(free: int | None) -> None:
            stat = os.statvfs(folder)
            used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
            size = 1 << 30 if free is None else used + free
            subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

        yield resize
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        shutil.rmtree(kept)


def can_mount() -> bool:
    """Whether a file system in memory can be mounted here."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def main(argv: list[str] | None = None) -> int:
    """Runs trials; prints the failures, and the counts at the end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--trials", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=sorted(KINDS))
    args = parser.parse_args(argv)
    kinds = [kind for kind in args.kinds if kind != "disk" or can_mount()]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        soak.expected(1)
        until = time.monotonic() + 60 * args.minutes
        for number in range(args.first, args.first + args.trials):
            if time.monotonic() > until:
                break
            rng = random.Random(f"{args.seed}/{number}")
            kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
            try:
                soak.trial(kind, rng)
            except Failure as error:
                failures += 1
                print(f"trial {number} of seed {args.seed} ({kind}): {error}", flush=True)
    parts = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.faults.items()))
    endings = ", ".join(f"{count} {how}" for how, count in sorted(soak.endings.items()))
    print(f"{sum(soak.faults.values())} faults ({parts}); trials: {endings}, {failures} failed")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
