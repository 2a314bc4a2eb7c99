"""Bad words of the command line, configurations, prompts and examples are refused in a sentence.

Each test makes the inputs of a kind one after the other, some drawn by a seed, and lists all that
were not refused as they must be.
"""

import itertools
import json
import os
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from bad_input import DEEP, INF, LONG, NAN, NOT_OBJECTS, Bad, Judge, mutated

from gptjax import bucket, config
from gptjax.checkpoint import head, shard_store
from gptjax.config import Config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

# --- paths and addresses ---------------------------------------------------------------------

# {} is the bad path, MADE the folder that `made` makes. After | the sorts of paths that are fine.
READ = """
config {} | long-name
sample {}
eval {}
inspect {}
predict {} --file MADE/text.txt --output out
sample MADE/run --file {} --output out | empty
eval MADE/run --text {}
eval MADE/run --task arc:{}
finetune MADE/run --task classify --data {} --valid {} --run out
finetune {} --task classify --data MADE/text.txt --valid MADE/text.txt --run out
convert hf:{} out
convert {} hf:out
convert peft:{} out --base MADE/run
tokenizer show {} --text a
tokenizer train out --source {} --vocab-size 300
data prepare MADE/tiny.json --data.store new --data.sources {}
data prepare MADE/tiny.json --data.store new --data.valid-sources {}
data prepare MADE/tiny.json --data.store n --tokenizer.kind huggingface --tokenizer.path {} | empty
data verify MADE/tiny.json --data.store {}
serve MADE/run --token-file {} --port 0 | empty
"""
WRITTEN = """
train MADE/tiny.json --run {} --data.sources absent.txt | home
data prepare MADE/tiny.json --data.store {} | home
convert hf:MADE/gpt2 {} --no-compare | home
convert MADE/run hf:{} --no-compare | home
sample MADE/run --file prompts.jsonl --output {} | empty home
tokenizer train {} --source MADE/text.txt --vocab-size 300 | home
plan gpt2:small --machine h100:1 --html {} | empty home
"""
PATHS = {
    "empty": "",
    "long": "x" * 5000,
    "long-name": "x" * 300,
    "nul": "a\0b",
    "surrogate": "a\ud800b",
    "home": "~nobody-here/x",
    "below a file": "prompts.jsonl/x",
}
SPECIAL = {"folder": "folder", "fifo": "fifo", "zero": "/dev/zero"}
ADDRESSES = ("s3://nowhere/x", "http://nowhere.invalid/x", "https://nowhere.invalid/x", "ftp://x/y")


def commands(table: str, made: Path, paths: Mapping[str, str]) -> Iterator[Bad]:
    """Each command of a table with each path."""
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n')
    for line, (sort, path) in itertools.product(filter(None, table.splitlines()), paths.items()):
        command, _, fine = line.partition(" | ")
        if sort in fine.split():
            continue
        words = command.replace("MADE", str(made)).split()
        flag = next((a for a, b in itertools.pairwise(words) if "{}" in b), words[0])
        names = (
            (path[:30], str(Path(path[:30])))
            if path
            else (f"{flag}=", f"{flag[2:]}=", "''", "empty", "names no folder")
        )
        if sort == "surrogate":
            names = ("surrogate", "\\ud800")
        if sort == "home":
            names += ("begins with ~",)
        yield Bad(tuple(word.replace("{}", path) for word in words), names)


@pytest.mark.parametrize("table", ["READ", "WRITTEN"])
def test_paths(judge: Judge, made: Path, table: str) -> None:
    judge(commands(globals()[table], made, PATHS))


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets whose servers are not there, which is found out soon."""
    monkeypatch.setattr(bucket, "_RETRIES", {"max_retries": 0})
    for module, name in ((bucket, "_FILE_S"), (head, "_PATIENCE_S"), (shard_store, "_RETRY_S")):
        monkeypatch.setattr(module, name, 0.1)
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setenv("AWS_ENDPOINT_URL", nowhere)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", nowhere)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", nowhere)


@pytest.mark.usefixtures("nobody_answers")
@pytest.mark.parametrize("table", ["READ", "WRITTEN"])
def test_addresses(judge: Judge, made: Path, table: str) -> None:
    judge(commands(globals()[table], made, {a: a for a in ADDRESSES}))


@pytest.mark.usefixtures("nobody_answers")
def test_addresses_of_a_store_that_is_looked_for(judge: Judge, made: Path) -> None:
    lines = (READ + WRITTEN).splitlines()  # for text, gcsfs tries again for a minute
    table = [one for one in lines if not re.search("(--text|--source|sources) {}", one)]
    judge(commands("\n".join(table), made, {"gs": "gs://no-such-bucket-here/x"}))


def test_special_files_are_not_read_for_ever(judge: Judge, made: Path) -> None:
    Path("folder").mkdir()
    os.mkfifo("fifo")
    table = READ.replace("eval MADE/run --text {}", "eval MADE/run --text {} | folder")
    judge(commands(table, made, SPECIAL))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(judge: Judge, made: Path) -> None:
    Path("secret").write_text("{}")
    Path("secret").chmod(0)
    judge(commands(READ, made, {"secret": "secret"}))


# --- configurations --------------------------------------------------------------------------

WRONG: dict[type, tuple[Any, ...]] = {
    bool: ("no", 0, 1.0, None, []),
    int: ("x", 1.5, True, [1], {}, NAN, INF, LONG, -LONG),
    float: ("x", True, [1], {}, NAN, INF, -INF, 10**400),
    str: (1, None, [], {}, True, "a\0b", "\ud800"),
    tuple: ("x", [1], [[]], {}, 3, None, ["\ud800"]),
}
SEEDS = range(4)


def nested(dotted: str, value: Any) -> dict[str, Any]:
    first, _, rest = dotted.partition(".")
    return {first: nested(rest, value) if rest else value}


def merged(whole: Any, part: Any) -> Any:
    if not (isinstance(whole, dict) and isinstance(part, dict)):
        return part
    return whole | {name: merged(whole.get(name), value) for name, value in part.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_configurations_with_a_wrong_value(judge: Judge, made: Path, seed: int) -> None:
    whole, rng = json.loads((made / "tiny.json").read_text()), random.Random(seed)

    def inputs() -> Iterator[Bad]:
        for name, default in config.flatten(Config()).items():
            if default is None:
                continue
            value = rng.choice(WRONG[type(default)])
            if name in ("train.seed", "data.seed") and isinstance(value, int):
                continue
            Path("c.json").write_text(json.dumps(merged(whole, nested(name, value))))
            yield Bad(("config", "c.json"), (name,), f"{name} = {value!r}"[:120])

    judge(inputs())


def test_configurations_of_another_shape(judge: Judge, made: Path) -> None:
    whole = json.loads((made / "tiny.json").read_text())
    sections = [name for name, value in whole.items() if isinstance(value, dict)]
    texts = [
        *NOT_OBJECTS,
        '{"a": ' * 5000 + "1" + "}" * 5000,
        '{"model": ' + DEEP + "}",
        "\0",
        "1e9",
    ]
    texts += [json.dumps({name: value}) for name in sections for value in (3, [], "x", None)]
    texts += [json.dumps({"modle": 1}), json.dumps({"x" * 5000: 1}), json.dumps({"\ud800": 1})]
    texts += ['{"model": {"layers": ' + "9" * 5000 + "}}"]

    def inputs() -> Iterator[Bad]:
        for text in texts:
            Path("c.json").write_text(text)
            names = ("c.json", "=", "unknown field", "model")
            yield Bad(("config", "c.json"), names, text)

    judge(inputs())


def test_overrides(judge: Judge, made: Path) -> None:
    wrong = {
        bool: ("no", "1.5"),
        int: ("x", "1.5", "nan", "1e3", str(LONG), str(-LONG)),
        float: ("x", "nan", "inf", "-inf", "1e400"),
    }
    fields = [(n, v) for n, v in config.flatten(Config()).items() if type(v) in wrong]

    def inputs() -> Iterator[Bad]:
        rng = random.Random(0)
        for name, default in rng.sample(fields, 40):
            flag, value = f"--{name.replace('_', '-')}", rng.choice(wrong[type(default)])
            yield Bad(("config", made / "tiny.json", f"{flag}={value}"), (flag, name))

    judge(inputs())


# --- numbers and prompts ---------------------------------------------------------------------

NUMBERS = f"""
data show MADE/tiny.json --step: 1e18 0 -1 nan x 1.5 {10**18} {2**63} {LONG} -{LONG}
data bench MADE/tiny.json --seconds: nan -1 0 inf x 1e400
sample MADE/run --max-tokens: 0 -1 1.5 nan {10**9} {LONG}
sample MADE/run --max-tokens 4 --temperature: -1 nan inf 1e400 x
sample MADE/run --max-tokens 4 --top-k: -1 1.5 x {LONG}
sample MADE/run --max-tokens 4 --top-p: 0 -1 1.5 nan inf
sample MADE/run --max-tokens 4 --min-p: -1 1 nan inf
sample MADE/run --max-tokens 4 --repetition-penalty: 0 -1 nan inf
sample MADE/run --max-tokens 4 --presence-penalty: nan inf -inf 1e400
sample MADE/run --max-tokens 4 --frequency-penalty: nan inf x
sample MADE/run --max-tokens 4 --logit-bias: x 1 1=x 1=nan 1=inf -1=1 {10**9}=1 {LONG}=1 1=2=3
sample MADE/run --max-tokens 4 --ban: -1 264 {2**31} {LONG} x
sample MADE/run --max-tokens 4 --samples: 0 -1 x {10**9} {LONG}
sample MADE/run --max-tokens 4 --seed: x 1.5 {LONG} -{LONG}
sample MADE/run --max-tokens 4 --logprobs: -1 21 x {LONG}
sample MADE/run --max-tokens 4 --rows: 0 -1 {10**9} {LONG}
sample MADE/run --max-tokens 4 --beams: -1 x {10**6} {LONG}
sample MADE/run --max-tokens 4 --beams 2 --length-penalty: nan inf x
eval MADE/run --text MADE/text.txt --length: -1 x 65 {LONG}
eval MADE/run --text MADE/text.txt --stride: -1 x 65 {LONG}
eval MADE/run --text MADE/text.txt --limit: -1 x 1.5
eval MADE/run --batch: -1 x {10**9} {LONG}
eval MADE/run --seed: -1 x
plan MADE/tiny.json --machine: x h100 h100:0 h100:-1 h100:{LONG} v5e:0x0 2x v5e:x nan
plan MADE/tiny.json --machine h100:1 --price: nan -1 inf x
tokenizer train out --source MADE/text.txt --vocab-size: 0 -1 x {10**9} {LONG}
tokenizer train out --source MADE/text.txt --vocab-size 300 --sample-bytes: 0 -1 x -{LONG}
tokenizer train out --source MADE/text.txt --vocab-size 300 --valid-fraction: nan -1 1 2 inf
serve MADE/run --port: -1 70000 x {LONG}
serve MADE/run --port 0 --rows: 0 -1 x {10**9} {LONG}
serve MADE/run --port 0 --queue: -1 x
serve MADE/run --port 0 --max-body: -1 0 x
serve MADE/run --port 0 --max-tokens-limit: -1 0 x
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "command", sorted({line.split()[0] for line in NUMBERS.split("\n") if line})
)
def test_numbers(judge: Judge, made: Path, command: str) -> None:
    def inputs() -> Iterator[Bad]:
        for line in NUMBERS.replace("MADE", str(made)).strip().splitlines():
            words, _, values = line.partition(": ")
            if words.split()[0] == command:
                *first, flag = words.split()
                name = flag[2:].replace("-", "_").replace("ban", "banned")
                for value in values.split():
                    names = (f"{flag}={value}", f"{flag}: ", f"{name}=", f"{name} ", value[:20])
                    yield Bad((*first, f"{flag}={value}"), names)

    judge(inputs())


LINES = (
    *(
        *NOT_OBJECTS[1:],
        "{}",
        '{"prompt": null}',
        '{"prompt": 3}',
        '{"prompt": {}}',
        '{"prompt": []}',
    ),
    *('{"prompt": "\\ud800"}', '{"prompt": [1.5]}', '{"prompt": [-1]}', '{"prompt": [99999]}'),
    *('{"prompt": [true]}', '{"prompt": "a", "temperature": NaN}', '{"prompt": "a", "top_k": 1e3}'),
    *('{"prompt": "a", "temperature": 1e999}', '{"prompt": "a", "logit_bias": {"x": 1}}'),
    *('{"prompt": "a", "logit_bias": {"1": NaN}}', '{"prompt": "a", "logit_bias": {"999999": 1}}'),
    *('{"prompt": "a", "banned": [-7]}', '{"prompt": "a", "stop": ["\\ud800", ""]}'),
    *('{"prompt": "a", "samples": 1000000000}', '{"prompt": "a", "": 1}'),
    f'{{"prompt": [{LONG}]}}',
    f'{{"prompt": "a", "seed": {LONG}}}',
    f'{{"prompt": "a", "temperature": {10**400}}}',
    '{"prompt": "a", "seed": ' + "9" * 5000 + "}",
)


def test_prompts(judge: Judge, made: Path) -> None:
    def inputs() -> Iterator[Bad]:
        for prompt in ("\ud800", "a\udcffb", "x\ud83d" * 9):
            yield Bad(
                ("sample", made / "run", "--prompt", prompt, "--max-tokens", 2), ("prompt", "UTF-8")
            )
            yield Bad(
                ("tokenizer", "show", made / "store", "--text", prompt),
                ("text", "UTF-8"),
                may_pass=True,
            )
            yield Bad(
                ("sample", made / "run", "--prompt", "a", "--max-tokens", 2, "--stop", prompt),
                ("stop", "UTF-8"),
            )
        for line in (*LINES, b"\xff\xfe", b'{"prompt": "\xff"}', b"\0" * 99):
            Path("p.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
            words = ("--file", "p.jsonl", "--output", "out.jsonl", "--max-tokens", 2)
            yield Bad(("sample", made / "run", *words), ("p.jsonl",), repr(line))

    judge(inputs())


# --- files of examples -----------------------------------------------------------------------

ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
SWAG = {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": ["c", "d"], "label": 0}
SQUAD = {
    "title": "t",
    "context": "c",
    "question": "q",
    "answers": {"text": ["c"], "answer_start": [0]},
}
OWN_SQUAD = {"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [SQUAD]}]}]}
TASKS = {"arc": ARC, "hellaswag": SWAG, "lambada": {"text": "one two"}, "squad": SQUAD}


def wrong_fields(record: Mapping[str, Any]) -> Iterator[str]:
    """The record with each of its fields absent, and of several wrong types."""
    for name in record:
        yield json.dumps({key: value for key, value in record.items() if key != name})
        for value in (None, 3.5, [], {}, [[]], [None], LONG, "\ud800"):
            yield json.dumps(record | {name: value})


@pytest.mark.parametrize("kind", TASKS)
def test_tasks(judge: Judge, made: Path, kind: str) -> None:
    def inputs() -> Iterator[Bad]:
        for text in (*NOT_OBJECTS, "{}", *wrong_fields(TASKS[kind])):
            Path("t.jsonl").write_text(text)
            fine = (kind == "squad" and '"title": ' in text) or "ud800" in text
            yield Bad(("eval", made / "run", "--task", f"{kind}:t.jsonl"), ("t.jsonl",), text, fine)
        for seed in range(8 if kind == "squad" else 0):
            text, place = mutated(OWN_SQUAD, seed)
            Path("t.json").write_text(text)
            yield Bad(("eval", made / "run", "--task", "squad:t.json"), ("t.json",), place, True)

    judge(inputs())


EXAMPLES = {
    "classify": {"text": "a", "pair": "b", "label": "x"},
    "choose": {"text": "a", "choices": ["b", "c"], "label": 0},
    "answer": {"prompt": "a", "answer": "b"},
}


@pytest.mark.parametrize("task", EXAMPLES)
def test_examples(judge: Judge, made: Path, task: str) -> None:
    good = json.dumps(EXAMPLES[task])
    Path("v.jsonl").write_text(good)
    messages: list[Any] = [3, [], [3], [{}], [{"role": 1, "content": 2}], [{"role": "user"}], {}]

    def inputs() -> Iterator[Bad]:
        more = [json.dumps({"messages": one}) for one in messages] * (task == "answer")
        for text in (*NOT_OBJECTS, "{}", *wrong_fields(EXAMPLES[task]), *more):
            fine = ('"text": "a", "label"', "ud800", f'"label": {LONG}')  # a pair is not required
            if not text or any(part in text for part in fine):
                continue
            Path("d.jsonl").write_text(f"{good}\n{text}")
            files = ("--data", "d.jsonl", "--valid", "v.jsonl")
            argv = ("finetune", made / "run", "--task", task, *files)
            yield Bad((*argv, "--run", "out"), ("d.jsonl",), text)

    judge(inputs())
