"""Damaged Hugging Face folders, runs and adapters: each is refused in a sentence."""

import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_input import DEEP, INF, LONG, NAN, NOT_OBJECTS, Bad, Judge, damaged, mutated

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

# --- Hugging Face folders --------------------------------------------------------------------

WIDTHS = (
    *(-1, 0, 1, 7, 10**9, 2**63, LONG, -LONG),
    *("x", "32", 1.5, 32.5, True, NAN, INF, [], {}),
)
IGNORED = ("bos_token_id", "eos_token_id", "pad_token_id", "n_ctx", "dtype", "rope_theta")
IGNORED += ("architectures", "attn_pdrop", "embd_pdrop", "resid_pdrop")


def opened(folder: Path | str) -> tuple[Any, ...]:
    """A command that opens a folder, and names --length and no file where nothing is wrong."""
    return ("eval", f"hf:{folder}", "--text", "prompts.jsonl", "--length", 10**70)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_config_json(judge: Judge, copied, family: str) -> None:
    folder = copied(family)
    values = json.loads((folder / "config.json").read_text())
    fine = {"n_head": (1,), "max_position_embeddings": (1, 7, 10**9, 2**63)}

    def inputs() -> Iterator[Bad]:
        texts = [*NOT_OBJECTS, "{}", f'{{"model_type": "{family}"}}', '{"model_type": []}']
        changes = [(text, text) for text in texts]
        for name in sorted(set(values) - set(IGNORED)):
            number = isinstance(values[name], int | float) and not isinstance(values[name], bool)
            for wrong in WIDTHS if number else (3, [], "x" * 500, {"a": {}}, NAN):
                if isinstance(values[name], float) and wrong in (1, 7, 1.5, 32.5):
                    continue
                if wrong != values[name] and wrong not in fine.get(name, ()):
                    changes.append((json.dumps(values | {name: wrong}), f"{name} = {wrong!r}"))
        for text, what in changes:
            for _ in damaged(folder / "config.json", text):
                yield Bad(opened(folder), ("config.json",), what)

    judge(inputs())


def test_the_index_and_its_files(judge: Judge, copied) -> None:
    folder = copied("gpt2")
    whole = folder / "model.safetensors"
    whole.rename(folder / "a.safetensors")
    from safetensors import safe_open

    with safe_open(folder / "a.safetensors", "np") as file:
        names = dict.fromkeys(file.keys(), "a.safetensors")
    some = next(iter(names))
    maps: list[Any] = [None, 3, [], "x", [["a", "b"]], {}]
    maps += [
        {some: wrong} for wrong in (3, None, [], {}, "", ".", "..", "../x", "/dev/zero", "a/b")
    ]
    maps += [
        names | {some: wrong} for wrong in (3, None, [], {}, True, "", "..", "absent", "x" * 300)
    ]
    maps += [
        names | {some: wrong} for wrong in ("../gpt2/a.safetensors", "a\0", "\ud800", "config.json")
    ]
    maps += [names | {"more": "a.safetensors"}, names | {"": ""}]

    def inputs() -> Iterator[Bad]:
        texts = [*NOT_OBJECTS, "{}", *(json.dumps({"weight_map": one}) for one in maps)]
        for text in texts:
            for _ in damaged(folder / "model.safetensors.index.json", text):
                yield Bad(opened(folder), ("index.json", "absent", str(folder)), text[-160:])

    judge(inputs())


def test_safetensors(judge: Judge, copied) -> None:
    folder = copied("gpt2")
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    name = next(name for name in header if name != "__metadata__")
    packed = lambda text: struct.pack("<Q", len(text)) + text + data

    def contents() -> Iterator[bytes]:
        yield from (b"", b"\0", b"\0" * 8, b"PK\3\4" + raw)
        yield from (raw[:100], raw[:-1], raw + b"\0", raw[8:])
        yield from (
            struct.pack("<Q", n) + raw[8:] for n in (0, 1, length + 1, 2**31, 2**63, 2**64 - 1)
        )
        yield from (packed(text.encode("utf-8", "replace")) for text in (*NOT_OBJECTS, "{}"))
        for key, values in (
            ("dtype", ("X", "", 3, None, "F128", "I64", "BOOL", "F8_E4M3", [])),
            ("shape", (None, 3, [], [-1], [LONG], [0], ["x"], [2**62, 4], [1.5])),
            ("data_offsets", (None, [], [0], [0, 2**62], [-1, 4], [8, 4], [4, 8], ["a", "b"])),
        ):
            for value in values:
                wrong = header | {name: header[name] | {key: value}}
                yield packed(json.dumps(wrong).encode())
        for seed in range(12):
            yield packed(mutated(header, seed)[0].encode())

    def inputs() -> Iterator[Bad]:
        for one in contents():
            for _ in damaged(file, one):
                yield Bad(opened(folder), (str(folder),), repr(one[:160]))

    judge(inputs())


FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@pytest.mark.parametrize("name", FILES)
def test_tokenizers(judge: Judge, copied, name: str) -> None:
    folder = copied("gpt2")
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["vocab"] = dict(list(whole["model"]["vocab"].items())[:9])
    keys = ("eos_token", "bos_token", "added_tokens_decoder", "chat_template", "add_bos_token")
    values: tuple[Any, ...] = (3, [], {}, [3], {"a": 1}, {"1": 2}, {"content": 3}, "absent", NAN)

    def texts() -> Iterator[tuple[str, str]]:
        yield from ((text, text) for text in NOT_OBJECTS)
        if name == "tokenizer.json":
            yield from (mutated(whole, seed) for seed in range(60))
        else:
            made = (json.dumps({key: value}) for key in keys for value in values)
            yield from ((text, text) for text in made)

    def inputs() -> Iterator[Bad]:
        for text, what in texts():
            for _ in damaged(folder / name, text):
                yield Bad(("tokenizer", "show", folder, "--text", "a"), (str(folder),), what, True)

    judge(inputs())


def test_sentencepiece_models(judge: Judge, copied) -> None:
    folder = copied("gpt2")
    (folder / "tokenizer.json").unlink()
    rng = random.Random(0)
    contents = [b"", b"\0", b"x" * 99, b"{}", b"\n\x0b\n\x01a\x15\0\0\0\0\x18\x01", b"\xff" * 999]
    contents += [rng.randbytes(rng.randrange(1, 400)) for _ in range(20)]

    def inputs() -> Iterator[Bad]:
        for one in contents:
            for _ in damaged(folder / "tokenizer.model", one):
                yield Bad(("tokenizer", "show", folder, "--text", "a"), (str(folder),), repr(one))

    judge(inputs())


TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{% for i in range(99999) %}{{ 'x' * 10**6 }}{% endfor %}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ [].append.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ 1/0 }}",
    "{{ absent.more }}",
    "{{ messages[7].content }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception() }}",
    "{{ strftime_now(3) }}",
    "{{ messages | tojson(indent='x' * 10**9) }}",
    "{% include 'x' %}",
    "{% if %}",
    "{{",
    "{% generation %}",
    "{{ messages | absent }}",
    "{" * 5000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "\ud800{{ messages[0].content }}",
    "",
)


def test_chat_templates(judge: Judge, copied, made: Path) -> None:
    folder = copied("gpt2")
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    Path("d.jsonl").write_text(json.dumps(line))
    files = ("--data", "d.jsonl", "--valid", "d.jsonl")

    def inputs() -> Iterator[Bad]:
        for template in TEMPLATES:
            text = json.dumps({"eos_token": "<eos>", "chat_template": template})
            for _ in damaged(folder / "tokenizer_config.json", text):
                argv = ("finetune", f"hf:{folder}", "--task", "answer", *files, "--run", "out")
                yield Bad(argv, ("template", "d.jsonl"), template)

    judge(inputs())


# --- runs and adapters -----------------------------------------------------------------------


def damages(file: Path) -> Iterator[tuple[str, str]]:
    """Contents for a JSON file, none of which is right, and what they are."""
    values = json.loads(file.read_text())
    texts = ["", "not JSON", "[]", "[[1]]", "3", "null", "{}", DEEP]
    if isinstance(values, dict):
        texts += [json.dumps(dict.fromkeys(values, wrong)) for wrong in (None, [], LONG)]
    yield from ((text, text[:80]) for text in texts)
    yield from (mutated(values, seed) for seed in range(8) if values)


def json_files(folder: Path) -> list[Path]:
    found = []
    for file in sorted(folder.rglob("*")):
        try:
            if file.is_file() and isinstance(json.loads(file.read_text()), dict | list):
                found.append(file)
        except ValueError:
            continue
    return found


def run_damages(made: Path, commands: tuple[str, ...], below: bool) -> Iterator[Bad]:
    folder = Path(shutil.copytree(made / "run", "run"))
    for file in json_files(folder):
        if (len(file.relative_to(folder).parts) > 1) == below:
            for text, what in list(damages(file)):
                for _ in damaged(file, text):
                    for command in commands:
                        names = (f"{folder}/", "=", "/store")  # a file, or a field and its value
                        yield Bad(tuple(command.split()), names, f"{file}: {what}", True)


QUICK = ("inspect run", "config run", "predict run --file x --output y", "data show run")
LONGER = ("sample run --prompt a --max-tokens 2", "eval run")


def test_runs(judge: Judge, made: Path) -> None:
    judge(run_damages(made, QUICK, below=False))


@pytest.mark.exhaustive
@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("command", LONGER)
def test_runs_in_use(judge: Judge, made: Path, below: bool, command: str) -> None:
    judge(run_damages(made, (command,), below))


def test_adapters(judge: Judge, made: Path) -> None:
    folder = Path("peft")
    folder.mkdir()
    config_file, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"]}
    import numpy as np
    from safetensors.numpy import save

    prefix = "base_model.model.transformer.h.0.attn.c_attn"
    a, b = np.ones((2, 32), np.float32), np.ones((96, 2), np.float32)
    pair = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    wrong: list[Any] = [{}, {f"{prefix}.lora_A.weight": a}, {"x": a}]
    wrong += [{**pair, f"{prefix}.lora_A.weight": one} for one in (a[:1], a[0], a[:, :3], a[:0], b)]
    wrong += [{**pair, f"{prefix}.lora_A.weight": a.astype(kind)} for kind in (np.int8, bool)]
    wrong += [{**pair, f"{prefix}.lora_A.weight": a * np.float32(NAN)}]
    fields = {
        "peft_type": (None, 3, "X", []),
        "lora_alpha": ("x", None, [], {}, NAN, INF, LONG, -LONG, 10**400, True),
        "alpha_pattern": (
            3,
            [],
            "x",
            {"(": 1},
            {"c_attn": "x"},
            {"([^ ]+)+!": 1},
            {"c_attn": None},
        ),
        "use_rslora": ("x", 3, []),
        "bias": ("all", 3, []),
        "init_lora_weights": ([], {}, "pissa"),
        "more": (1, "x" * 5000),
    }

    def inputs() -> Iterator[Bad]:
        convert = ("convert", "peft:peft", "out", "--base", made / "run", "--no-compare")
        tensors.write_bytes(save(pair))
        for text in NOT_OBJECTS:
            config_file.write_text(text)
            yield Bad(convert, ("peft",), text)
        for name, values in fields.items():
            for value in values:
                config_file.write_text(json.dumps(good | {name: value}))
                yield Bad(convert, ("adapter_config.json",), f"{name} = {value!r}")
        config_file.write_text(json.dumps(good))
        for one in wrong:
            tensors.write_bytes(save(one))
            yield Bad(convert, ("peft",), str({n: (t.shape, t.dtype) for n, t in one.items()}))
        for raw in (b"", b"\0" * 8, b"\xff" * 99, save(pair)[:-1]):
            tensors.write_bytes(raw)
            yield Bad(convert, ("peft",), repr(raw[:60]))

    judge(inputs())
