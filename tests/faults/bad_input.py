"""Runs `gptjax` on bad input in this process, and judges how it is refused.

Each input must get one sentence that names it, a known exit code, in little time and memory, and
leave nothing behind. The fixtures are for all tests in this folder.
"""

import io
import json
import random
import resource
import shutil
import signal
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gptjax import config
from gptjax.cli import main
from gptjax.config import Config, DataConfig, EvalConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.hf import safetensors
from gptjax.runtime import malloc

EXIT_CODES = {2, 65, 69, 70, 71, 73, 74, 75, 78}
LIMIT_S, LIMIT_BYTES, LIMIT_CHARACTERS = 20, 4 << 30, 2000
LONG, NAN, INF = 10**60, float("nan"), float("inf")
DEEP = "[" * 100_000 + "]" * 100_000
NOT_OBJECTS = ("", "not JSON", "[]", "[1, 2]", "3", "null", '"text"', "NaN", DEEP, "\ufeff{}", "{")
REGION = "\u2502\u256d\u256e\u2570\u256f\u2500"  # the frame that tyro draws around a message


# --- the judge -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """Words of the command line, one of which is bad or names what is; `names` are what the message
    must have one of. `what` tells of a file that was damaged. One that `may_pass` is damaged where
    the command need not look."""

    argv: tuple[Any, ...]
    names: tuple[str, ...] = ()
    what: str = ""
    may_pass: bool = False

    def __str__(self) -> str:
        words = " ".join(repr(str(word))[:90] for word in self.argv)
        return f"{words[:400]}{' with ' * bool(self.what)}{self.what[:160]}"


class OutOfTimeError(BaseException):
    """The limit of one input has passed; no `except Exception` stops it."""


@contextmanager
def limited() -> Iterator[None]:
    """Ends what takes too long or too much memory."""

    def ring(*_: object) -> None:
        raise OutOfTimeError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT_BYTES, hard))
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run(argv: tuple[Any, ...]) -> tuple[int | str, str]:
    """Exit code, or how it ended instead, and standard error."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    code: int | str
    with redirect_stdout(out), redirect_stderr(err):
        try:
            with limited():
                code = main.main([str(word) for word in argv])
        except SystemExit as exit:  # argparse and tyro
            code = exit.code if isinstance(exit.code, int) else 0
        except OutOfTimeError:
            code = f"still running after {LIMIT_S} s"
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "/gptjax/" in f.filename] or frames
            place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[:-4:-1])
            code = f"{type(error).__name__}: {str(error)[:120]!r} at {place}"
    err.flush()
    return code, err.buffer.getvalue().decode()


def squeezed(text: str) -> str:
    return "".join(c for c in text if not c.isspace() and c not in REGION)


def problem(bad: Bad, code: int | str, err: str) -> str:
    """What is wrong with the way in which an input was refused; empty if nothing is."""
    if code == 0:
        return "" if bad.may_pass else f"accepted (stderr: {err[-160:]!r})"
    if code not in EXIT_CODES:
        return f"ended with {code}"
    if "Traceback" in err or len(err) > LIMIT_CHARACTERS:
        return f"{code}, told in {len(err)} characters: {err[-120:]!r}"
    names = [squeezed(shown) for name in bad.names for shown in (name, repr(name)[1:-1])]
    if bad.names and not any(name in squeezed(err) for name in names):
        return f"{code}, not named: {err[-300:]!r}"
    return ""


Judge = Callable[[typing.Iterable[Bad]], None]


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Runs all of a kind in a folder of its own, and fails with what was not refused well."""
    monkeypatch.setattr(malloc, "keep_memory", lambda: False)
    monkeypatch.chdir(tmp_path)

    def call(inputs: typing.Iterable[Bad]) -> None:
        failures, count = [], 0
        for bad in inputs:
            count += 1
            before, start = set(tmp_path.rglob("*")), time.monotonic()
            code, err = run(bad.argv)
            wrong = problem(bad, code, err)
            left = sorted(set(tmp_path.rglob("*")) - before)
            for path in reversed(left):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if left and code != 0 and not wrong:
                wrong = f"{code}, left {', '.join(str(p.relative_to(tmp_path)) for p in left)}"
            if wrong:
                failures.append(f"{bad}\n    {wrong} ({time.monotonic() - start:.1f} s)")
        print(f"{count} bad inputs, {len(failures)} not refused as they must be")
        assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures)

    return call


# --- what is damaged -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def made(tmp_path_factory, on_mesh, random_params) -> Path:
    """A folder with a trained run, its CONFIG tiny.json, and Hugging Face folders gpt2 and llama.

    Nobody changes what is in it.
    """
    root = tmp_path_factory.mktemp("made")
    (root / "text.txt").write_text("text is read here\n" * 200)
    (root / "valid.txt").write_text("other text is read there\n" * 40)
    model = ModelConfig(vocab_size=264, context=64, layers=2, embed=32, heads=8)
    cfg = Config(
        run=str(root / "run"),
        model=model,
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            sources=(str(root / "text.txt"),),
            valid_sources=(str(root / "valid.txt"),),
            store=str(root / "store"),
            workers=1,
        ),
        train=TrainConfig(tokens=1024, batch_tokens=512, seq_len=32),
        eval=EvalConfig(batch=8, sample_tokens=8, every=0),
    )
    (root / "tiny.json").write_text(json.dumps(config.to_dict(cfg)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(malloc, "keep_memory", lambda: False)
        assert main.main(["train", str(root / "tiny.json")]) == 0
    llama = {"activation": "swiglu", "norm": "rmsnorm", "positions": "rope", "linear_bias": False}
    for name, fields in (("gpt2", {}), ("llama", llama)):
        (root / name).mkdir()
        own = replace(model, vocab_size=300, **fields)
        with on_mesh():
            safetensors.write_folder(root / name, random_params(own, std=0.1), own)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        library = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", *alphabet])}, []))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.add_special_tokens(["<eos>"])
        library.save(str(root / name / "tokenizer.json"))
        (root / name / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return root


def damaged(file: Path, contents: str | bytes) -> Iterator[Path]:
    """The file with other contents, for one round of a loop; then as it was."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    yield file
    file.unlink() if before is None else file.write_bytes(before)


def mutated(values: Any, seed: int) -> tuple[str, str]:
    """JSON with one value, at any depth, replaced, left out or wrapped; and which it is."""
    rng, values = random.Random(seed), json.loads(json.dumps(values))
    at, places = [values], []
    while at:
        one = at.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        places += [(one, key) for key in keys]
        at += [one[key] for key in keys if isinstance(one[key], dict | list)]
    holder, key = rng.choice(places)
    wrong = (None, True, -1, 0, LONG, 1.5, float("nan"), "", "x\0", "\ud800", [], {}, [[]], {"": 1})
    action = rng.randrange(len(wrong) + 2)
    if action < len(wrong):
        holder[key] = wrong[action]
    elif action == len(wrong):
        del holder[key]
    else:
        holder[key] = [holder[key]]
    now = repr(holder[key])[-80:] if action != len(wrong) else "absent"
    return json.dumps(values), f"{key!r}: {now}"


@pytest.fixture
def copied(made: Path, judge: Judge) -> Callable[[str], Path]:
    """A copy of a folder of `made`, to damage."""

    def copy(name: str) -> Path:
        Path("prompts.jsonl").write_text('{"text": "a"}\n')
        return Path(shutil.copytree(made / name, name))

    return copy
