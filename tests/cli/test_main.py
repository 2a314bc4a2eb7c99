"""The command line: light help, one sentence and an exit code for each mistake, no traceback."""

import ast
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gptjax import config
from gptjax.config import Config, DataConfig, EvalConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.data import prepare
from gptjax.data.split import share
from gptjax.runtime import malloc

pytestmark = pytest.mark.usefixtures("quick_compile")

REPO = Path(__file__).resolve().parents[2]
QUICKSTART = str(REPO / "configs" / "quickstart.py")


@pytest.fixture(autouse=True)
def _malloc_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc, "keep_memory", lambda: False)


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """A tiny run on a few texts, with bytes for tokens; nothing is made yet."""
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"text {number} is read here\n" * 40)
    return Config(
        run=str(tmp_path / "run"),
        model=ModelConfig(vocab_size=264, context=64, layers=1, embed=16, heads=8),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            sources=(f"{tmp_path}/[0-2].txt",),
            valid_sources=(f"{tmp_path}/3.txt",),
            store=str(tmp_path / "store"),
            workers=1,
        ),
        train=TrainConfig(tokens=1024, batch_tokens=512, seq_len=32),
        eval=EvalConfig(batch=8, sample_tokens=8),
    )


def saved(cfg: Config, file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config.to_dict(cfg)))
    return str(file)


@pytest.fixture
def preset(cfg: Config, tmp_path: Path) -> str:
    return saved(cfg, tmp_path / "tiny.json")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(command_line: Run) -> Run:
    return command_line


def sentence(err: str) -> str:
    """The only line on standard error."""
    (line,) = err.strip().splitlines()
    assert line.startswith("gptjax: ")
    return line


# --- help ------------------------------------------------------------------------------------

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "tensorstore", "numpy"}
PROBE = """
import atexit, sys
atexit.register(lambda: print("LOADED", *{m.partition(".")[0] for m in sys.modules}))
from gptjax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--help"], ["train", "eval", "sample", "data", "tokenizer", "config"]),
        (["sample", "--help"], ["--prompt", "--temperature", "--top-k", "--seed"]),
        (["data", "prepare", "--help"], ["CONFIG"]),
        (["config", QUICKSTART, "--optim.lr", "1"], ["optim.lr", "command line"]),
    ],
)
def test_help_and_config_load_neither_jax_nor_tensorflow(argv, wanted) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, check=True
    )
    out, _, loaded = done.stdout.partition("LOADED")
    assert all(word in out for word in wanted)
    assert "gptjax" in loaded.split()
    assert HEAVY.isdisjoint(loaded.split())


@pytest.mark.parametrize("command", ["train", "config", "data prepare", "data bench"])
def test_help_after_a_config_lists_the_overrides(run: Run, command: str) -> None:
    code, out, _ = run(*command.split(), QUICKSTART, "--help")
    assert code == 0
    assert "--optim.lr" in out
    assert "Peak learning rate" in out
    assert "--model.vocab-size" in out


@pytest.mark.parametrize("argv", [[], ["trian"], ["data"], ["sample"], ["train"]])
def test_an_incomplete_or_unknown_command_is_a_usage_error(run: Run, argv: list[str]) -> None:
    code, out, err = run(*argv)
    assert code == 2
    assert "usage: gptjax" in err
    assert out == ""


def test_a_flag_that_a_command_does_not_have_is_a_usage_error(run: Run) -> None:
    code, _, err = run("sample", "runs/x", "--optim.lr", "3")
    assert code == 2
    assert "--optim.lr" in err


# --- configurations --------------------------------------------------------------------------


def test_config_prints_each_value_with_where_it_came_from(run: Run) -> None:
    code, out, err = run("config", QUICKSTART, "--model.layers", "2", "--optim.lr=0.5")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert set(lines) == set(config.flatten(Config()))
    assert lines["model.layers"].split() == ["model.layers", "2", "command", "line"]
    assert lines["optim.lr"].split() == ["optim.lr", "0.5", "command", "line"]
    assert lines["model.embed"].split() == ["model.embed", "256", QUICKSTART]
    assert lines["optim.b1"].split() == ["optim.b1", "0.9", "default"]


@pytest.mark.parametrize(
    ("overrides", "name", "value"),
    [
        (["--data.sources", "a.txt", "b/*.txt"], "data.sources", ("a.txt", "b/*.txt")),
        (["--mesh.data", "-1", "--mesh.fsdp", "2"], "mesh.fsdp", 2),
        (["--model.kv-heads", "2"], "model.kv_heads", 2),
        (["--model.kv-heads", "None"], "model.kv_heads", None),
        (["--compute.scan-layers", "True"], "compute.scan_layers", True),
        (["--optim.name", "muon"], "optim.name", "muon"),
        (["--eval.prompts", "def ", ""], "eval.prompts", ("def ", "")),
        (["--run=elsewhere"], "run", "elsewhere"),
    ],
)
def test_what_config_json_prints_is_itself_a_configuration(
    run: Run, tmp_path: Path, overrides: list[str], name: str, value: object
) -> None:
    code, out, _ = run("config", QUICKSTART, *overrides, "--json")
    assert code == 0
    file = tmp_path / "resolved.json"
    file.write_text(out)
    assert config.flatten(config.load(str(file)))[name] == value
    assert run("config", file, "--json")[1] == out


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("--optim.lrr", "--optim.lr"),
        ("--model.layrs", "--model.layers"),
        ("--train.batch-token", "--train.batch-tokens"),
    ],
)
@pytest.mark.parametrize("command", ["config", "train", "data prepare"])
def test_an_unknown_override_is_answered_with_the_nearest(
    run: Run, command: str, override: str, nearest: str
) -> None:
    code, out, err = run(*command.split(), QUICKSTART, override, "3")
    assert (code, out) == (2, "")
    assert f"{override}, 3" in err
    assert f" {nearest} " in err  # with what it takes


def test_the_hint_of_a_wrong_override_is_a_command_that_exists(run: Run, monkeypatch) -> None:
    monkeypatch.chdir(REPO)
    _, _, err = run("config", "configs/quickstart.py", "--optim.lrr", "3")
    words = err.replace("│", " ").split()
    start = words.index("run") + 1
    assert words[start : start + 4] == ["gptjax", "config", "configs/quickstart.py", "--help"]


@pytest.mark.parametrize(
    ("override", "value"), [("--optim.lr", "fast"), ("--model.norm", "batch"), ("--mesh.data", "x")]
)
def test_an_override_of_another_type_is_named(run: Run, override: str, value: str) -> None:
    code, _, err = run("config", QUICKSTART, override, value)
    assert code == 2
    assert override in err
    assert value in err


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("quickstar.py", ["quickstar.py: no such file", "quickstart.py"]),
        ("quickstart.py:mian", ["mian", "did you mean main?"]),
        ("", ["has no config.json"]),
    ],
)
@pytest.mark.parametrize("command", ["config", "train", "data prepare", "data show"])
def test_a_configuration_that_is_not_there_is_named(run: Run, command, name, wanted) -> None:
    code, out, err = run(*command.split(), REPO / "configs" / name)
    assert (code, out) == (2, "")
    assert all(part in sentence(err) for part in wanted)


def test_values_that_do_not_go_together_are_told_all_at_once(run: Run) -> None:
    code, _, err = run("config", QUICKSTART, "--model.heads", "7", "--train.seq-len", "1024")
    assert code == 2
    assert err.startswith("gptjax: ")
    assert "model.heads=7: " in err
    assert "train.seq_len=1024: " in err


# --- training that cannot begin --------------------------------------------------------------


def test_a_batch_that_the_mesh_does_not_divide_names_axis_and_nearest(run, preset, cfg) -> None:
    code, _, err = run("train", preset, "--train.batch-tokens", "384")  # 12 rows, 8 devices
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("gptjax: ")
    for part in ("train.batch_tokens=384", "data x fsdp x expert = 8", "256 or 512"):
        assert part in last
    assert not (Path(cfg.run) / config.CONFIG_FILE).exists()


@pytest.mark.parametrize("command", ["train", "data prepare"])
def test_sigterm_while_text_is_prepared_ends_with_a_word(
    run: Run, preset: str, cfg: Config, monkeypatch, command: str
) -> None:
    def stopped(*_) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(prepare, "_tokenize", stopped)
    before = signal.getsignal(signal.SIGTERM)
    code, _, err = run(*command.split(), preset)
    assert code == 75
    assert "told to stop by SIGTERM while the text was prepared; what is done is kept" in err
    assert ("to continue: gptjax train" in err) == (command == "train")
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_that_would_only_come_again_has_no_command_to_continue(
    run: Run, preset: str, cfg: Config, tmp_path
) -> None:
    (tmp_path / "0.txt").write_bytes(b"%PDF-1.4\n%\x80\x81")
    code, _, err = run("train", preset)
    assert code == 65
    assert "to continue" not in err


@pytest.mark.parametrize("path", ["gpt2", "meta-llama/Llama-3.1-8B", "hf:gpt2"])
@pytest.mark.parametrize("command", ["sample PATH", "serve PATH", "eval PATH", "convert PATH new"])
def test_a_name_of_the_hub_gets_the_command_that_fetches_it(
    run: Run, tmp_path, monkeypatch, command: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if command.startswith("convert") and not path.startswith("hf:"):
        path = f"hf:{path}"
    code, _, err = run(*command.replace("PATH", path).split())
    name = path.removeprefix("hf:")
    assert code == 2
    assert f"{name}: no such folder" in sentence(err)
    assert f"hf download {name} --local-dir {name.rpartition('/')[2]}" in err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", pytest.param("copied", marks=pytest.mark.exhaustive)])
def test_a_folder_given_as_config_is_the_run(
    run: Run, preset: str, cfg: Config, tmp_path: Path, how: str
) -> None:
    assert run("train", preset, "--eval.every", 0)[0] == 0
    there, original = tmp_path / "elsewhere", Path(cfg.run)
    if how == "moved":
        original.rename(there)
    else:
        shutil.copytree(original, there)
    more = ("--train.tokens", 2048, "--eval.every", 0)
    code, out, err = run("train", there, *more)
    assert code == 0, err
    assert "resumed after step 2 of 4" in err
    assert json.loads(out.splitlines()[-1])["run"] == str(there)
    assert (there / "checkpoints" / "4").is_dir()
    assert not (original / "checkpoints" / "4").exists()
    assert original.exists() == (how == "copied")


def test_a_run_folder_in_use_is_left_alone(run: Run, preset: str, cfg: Config) -> None:
    folder = Path(cfg.run)
    folder.mkdir()
    with (folder / "run.lock").open("w") as held:
        held.write("process 42 on another\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = run("train", preset)
        assert code == 73
        assert f"run={cfg.run}" in sentence(err)
        assert "in use by process 42 on another" in err
        assert f"to continue: gptjax train {preset}" in err
        assert (folder / "run.lock").read_text() == "process 42 on another\n"
    assert [p.name for p in folder.iterdir()] == ["run.lock"]
    assert not Path(cfg.data.store).exists()


def test_a_run_below_a_regular_file_cannot_be_written(run: Run, preset: str, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("train", preset, "--run", tmp_path / "file" / "run")
    assert code == 73
    assert f"run={tmp_path}/file/run: cannot be written" in sentence(err)


def test_a_run_folder_of_another_run_is_refused_with_the_differences(
    run: Run, preset: str, cfg: Config
) -> None:
    other = replace(cfg, model=replace(cfg.model, layers=2), train=replace(cfg.train, seed=9))
    file = Path(saved(other, Path(cfg.run) / config.CONFIG_FILE))
    before = file.read_text()
    code, _, err = run("train", preset)
    assert code == 78
    assert err.startswith("gptjax: ")
    assert cfg.run in err
    lines = [line.strip() for line in err.splitlines()]
    for name, there, here in (("model.layers", "2", "1"), ("train.seed", "9", "0")):
        (line,) = [line for line in lines if line.startswith(f"{name}: ")]
        assert there in line
        assert here in line
    assert file.read_text() == before
    assert not Path(cfg.data.store).exists()


def test_checkpoints_without_their_configuration_are_not_trained_over(
    run, preset, cfg, monkeypatch
) -> None:
    monkeypatch.setattr(
        "gptjax.checkpoint.checkpointer.Checkpointer.steps", lambda checkpoints: [5]
    )
    code, _, err = run("train", preset)
    assert code == 78
    assert f"{cfg.run} has checkpoints but no config.json" in sentence(err)
    assert not (Path(cfg.run) / config.CONFIG_FILE).exists()


@pytest.mark.parametrize("command", ["train", "data prepare"])
@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["--data.sources", "absent.txt"], "data.sources=absent.txt: no such file"),
        (["--data.valid-sources", "absent.txt"], "data.valid_sources=absent.txt: no such file"),
        (
            ["--tokenizer.path", "absent.model", "--tokenizer.kind", "sentencepiece"],
            "tokenizer.path=absent.model: no such file",
        ),
    ],
)
def test_a_missing_file_is_named(run, preset, command: str, overrides, wanted: str) -> None:
    code, _, err = run(*command.split(), preset, *overrides)
    assert code == 65
    assert wanted in sentence(err)


# --- tokenizers ------------------------------------------------------------------------------

TOKENIZER_TRAINED = re.compile(
    r"(?P<folder>\S+): (?P<algorithm>\w+), 400 pieces trained on 0\.\d\d MB in \d+\.\d s "
    r"\(\d+\.\d\d MB/s\); encodes \d+\.\d\d MB/s on one core and (?P<ratio>\d\.\d{3}) bytes per "
    r"token, on the 0\.\d\d MB of (?P<documents>\d+) held-out documents\n"
)


@pytest.fixture(scope="module")
def library_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some real text: modules of the running Python's library, 20 files."""
    folder = tmp_path_factory.mktemp("texts")
    modules = sorted(Path(os.__file__).parent.glob("[a-d]*.py"))[:20]
    assert len(modules) == 20
    for module in modules:
        (folder / module.name).write_bytes(module.read_bytes())
    return folder


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "byte_bpe", "wordpiece"])
def test_a_tokenizer_is_trained_and_can_be_used(run, library_texts, tmp_path, algorithm) -> None:
    folder = tmp_path / "tokenizer"
    words = ["--source", f"{library_texts}/*.py", "--algorithm", algorithm, "--vocab-size", 400]
    words += ["--sample-bytes", 150_000, "--valid-fraction", 0.2]
    code, out, err = run("tokenizer", "train", folder, *words)
    assert code == 0, err
    found = TOKENIZER_TRAINED.fullmatch(out)
    assert found
    assert (found["folder"], found["algorithm"]) == (str(folder), algorithm)
    assert 1.2 < float(found["ratio"]) < 4
    texts = [file.read_text() for file in sorted(library_texts.iterdir())]
    held_out = [len(text.encode()) for text in texts if share(text) < 0.2]
    enough = next(n for n in range(99) if sum(held_out[:n]) >= 150_000 or n == len(held_out))
    assert int(found["documents"]) == enough > 0

    code, shown, _ = run("tokenizer", "show", folder, "--text", "import os")
    first, *pieces = shown.splitlines()
    assert code == 0
    assert "eos" in first
    spelt = "".join(ast.literal_eval(line.split(maxsplit=1)[1]) for line in pieces)
    assert spelt.replace("##", "").replace("Ġ", " ").replace(" ", "") == "importos"

    code, _, err = run("tokenizer", "train", folder, *words)
    assert code == 73
    assert f"{folder}: holds a tokenizer already" in sentence(err)


@pytest.mark.parametrize(
    ("words", "code", "wanted"),
    [
        (["--source", "absent.txt"], 65, "data.sources=absent.txt: no such file"),
        (["--vocab-size", "0"], 2, "tokenizer.vocab_size=0: must be at least 1"),
        (["--algorithm", "byte_bpe", "--vocab-size", "9"], 2, "byte_bpe needs at least 257"),
        (["--valid-fraction", "1"], 2, "data.valid_fraction=1.0: must be"),
        (["--source", "0.txt"], 65, "tokenizer.vocab_size=4096: "),
        (["--source", "[0-2].txt", "--valid-fraction", "0.7"], 65, "tokenizer.vocab_size=4096: "),
    ],
)
def test_a_tokenizer_that_cannot_be_trained(
    run: Run, preset: str, tmp_path: Path, monkeypatch, words: list[str], code: int, wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    got, _, err = run("tokenizer", "train", "new", *words)
    assert got == code
    assert wanted in sentence(err.splitlines()[-1])
    assert not list(Path("new").glob("*"))


def test_showing_a_folder_without_a_tokenizer(run: Run, tmp_path: Path) -> None:
    code, _, err = run("tokenizer", "show", tmp_path, "--text", "a")
    assert code == 65
    assert f"{tmp_path}: no tokenizer found" in sentence(err)


# --- data ------------------------------------------------------------------------------------


def test_data_prepare_verify_and_show(run: Run, preset: str, cfg: Config) -> None:
    code, out, _ = run("data", "prepare", preset)
    assert code == 0
    assert "train: 3 documents, 2,400 bytes, 2,404 tokens" in out
    assert "valid: 1 documents, 800 bytes, 802 tokens" in out
    rate = re.compile(r"0\.0 MB of text tokenized in \d+\.\d s \(\d+\.\d MB/s\)")
    assert rate.fullmatch(out.splitlines()[-1])
    code, again, _ = run("data", "prepare", preset)
    assert (code, again.splitlines()) == (0, out.splitlines()[:-1])
    assert run("data", "verify", preset)[0] == 0

    code, first, _ = run("data", "show", preset)
    assert code == 0
    assert len(first.splitlines()) == cfg.train.batch
    assert "is read here" in first
    assert run("data", "show", preset, "--step", "1")[1] == first
    assert run("data", "show", preset, "--step", "1000000")[0] == 0
    code, _, err = run("data", "show", preset, "--step", "0")
    assert code == 2
    assert "--step=0" in sentence(err)

    file = Path(cfg.data.store) / "train" / "c" / "0"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    code, _, err = run("data", "verify", preset)
    assert code == 65
    assert str(file) in sentence(err)
    file.write_bytes(raw[:-1])
    for command in ("prepare", "verify", "show"):
        code, _, err = run("data", command, preset)
        assert code == 65
        assert str(file) in sentence(err)


@pytest.mark.parametrize("command", ["verify", "show"])
def test_a_store_that_is_not_there_is_named(run: Run, preset, cfg, command: str) -> None:
    code, _, err = run("data", command, preset)
    assert code == 65
    assert cfg.data.store in sentence(err)
    assert "gptjax data prepare" in err


def test_a_store_of_other_data_is_refused_with_the_differences(run: Run, preset: str) -> None:
    assert run("data", "prepare", preset)[0] == 0
    code, _, err = run("data", "prepare", preset, "--data.text-field", "body")
    assert code == 78
    assert "text_field: 'text' in the store, 'body' given" in err


def test_an_empty_corpus_is_told(run: Run, preset: str, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n\n")
    code, _, err = run("data", "prepare", preset, "--data.sources", tmp_path / "blank.txt")
    assert code == 65
    assert f"data.sources={tmp_path}/blank.txt: no text" in err.strip().splitlines()[-1]


# --- runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_a_folder_that_is_no_run_is_told(run: Run, cfg, tmp_path: Path, command: str) -> None:
    code, _, err = run(command, tmp_path / "absent")
    assert code == 2
    assert "no such folder" in sentence(err)
    code, _, err = run(command, tmp_path)
    assert code == 2
    assert "not a run folder" in sentence(err)
    saved(cfg, tmp_path / "begun" / config.CONFIG_FILE)
    code, _, err = run(command, tmp_path / "begun")
    assert code == 65
    assert str(tmp_path / "begun") in sentence(err)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--temperature", "-1"), ("--top-p", "0"), ("--top-k", "-3"), ("--max-tokens", "0")],
)
def test_sample_refuses_settings_out_of_range_before_it_loads(run, tmp_path, flag, value) -> None:
    code, _, err = run("sample", tmp_path / "absent", flag, value)
    assert code == 2
    assert flag.strip("-").replace("-", "_") in sentence(err).replace("-", "_")


# --- sample ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of a tiny model with bytes for tokens, as an import leaves it: nothing is trained."""
    import jax
    import jax.numpy as jnp

    from gptjax.checkpoint import run_dir as runs
    from gptjax.checkpoint.checkpointer import Checkpointer
    from gptjax.config import CheckpointConfig
    from gptjax.model import decoder
    from gptjax.parallel import mesh
    from gptjax.tokenizer import ByteTokenizer

    folder = tmp_path_factory.mktemp("sampled") / "run"
    folder.mkdir()
    model = ModelConfig(vocab_size=264, context=64, layers=1, embed=16, heads=8, init_std=0.5)
    made = Config(run=str(folder), model=model, tokenizer=TokenizerConfig(kind="bytes"))
    made = replace(made, log=replace(made.log, compile_cache=""))
    with mesh.entered_mesh(made):
        params = decoder.init(model, jax.random.key(0))
        runs.record_imported(made, ByteTokenizer(), {"folder": "nowhere"})
        with Checkpointer(folder / runs.CHECKPOINTS, CheckpointConfig(), lambda step: {}) as saver:
            saver.save(0, {"step": jnp.int32(0), "params": params})
            saver.finish()
    return str(folder)


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.slow
def test_programs_of_a_prompt_are_precompiled_with_zeros_and_errors_in_it_are_ignored(
    run, trained, monkeypatch, fails
) -> None:
    import jax

    from gptjax.sample import Sampler

    seen, precompile = [], Sampler.precompile

    def spy(sampler, prompts, settings):
        seen.append((prompts, all(not leaf.any() for leaf in jax.tree.leaves(sampler.params))))
        if fails:
            raise RuntimeError("nobody is told")
        precompile(sampler, prompts, settings)

    words = ["sample", trained, "--prompt", "ab", "--max-tokens", 6, "--temperature", 0]
    plain = run(*words)
    monkeypatch.setattr(Sampler, "precompile", spy)
    assert run(*words) == plain
    assert plain[0] == 0
    assert seen == [(["ab"], True)]
    run(*words, "--beams", 2)
    assert len(seen) == 1


def test_sample_prints_prompt_and_continuation_and_json_with_log_probabilities(
    run, trained
) -> None:
    words = ["sample", trained, "--prompt", "ab", "--max-tokens", 6, "--temperature", 0]
    code, text, _ = run(*words)
    assert code == 0
    assert text.startswith("ab")
    code, out, _ = run(*words, "--json", "--logprobs", 2)
    assert code == 0
    (one,) = map(json.loads, out.splitlines())
    assert text == f"ab{one['text']}\n"
    assert len(one["tokens"]) == 6
    assert all(len(token["top"]) == 2 and token["logprob"] <= 0 for token in one["tokens"])
    assert all(token["top"][0]["logprob"] == token["logprob"] for token in one["tokens"])  # greedy


@pytest.mark.slow
def test_sample_takes_the_dtype_and_the_number_of_rows(run, trained) -> None:
    words = ["sample", trained, "--prompt", "ab", "--max-tokens", 6, "--temperature", 0]
    code, text, _ = run(*words, "--dtype", "bfloat16", "--rows", 1)
    assert code == 0
    assert text.startswith("ab")


def test_a_prompt_that_ends_in_a_space_is_told_where_tokens_begin_with_theirs(
    run: Run, trained
) -> None:
    _, _, err = run("sample", trained, "--prompt", "text ", "--max-tokens", "2")
    assert "ends in a space" not in err  # its tokens are bytes
    from gptjax.sample.sampling_params import trailing_space_note
    from gptjax.tokenizer import ByteTokenizer, train

    pieces = train(["def f of a b\n" * 99], TokenizerConfig(vocab_size=272))
    assert pieces.encode("a b") != pieces.encode("a ") + pieces.encode("b")
    note = trailing_space_note(["def", "def "], pieces)
    assert note.startswith("prompt 'def ' ends in a space")
    assert trailing_space_note(["def", "def\n"], pieces) == ""
    assert trailing_space_note(["def "], ByteTokenizer()) == ""


@pytest.mark.slow
def test_sample_searches_beams(run, trained) -> None:
    words = ["sample", trained, "--prompt", "ab", "--max-tokens", 5, "--beams", 3, "--json"]
    code, out, _ = run(*words, "--samples", 3)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [one["sample"] for one in found] == [0, 1, 2]
    assert sorted((one["score"] for one in found), reverse=True) == [one["score"] for one in found]


def test_a_file_of_prompts_is_continued_and_taken_up_where_it_was_left(
    run, trained, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given = [
        {"prompt": "one"},
        {"prompt": [104, 105], "temperature": 0, "max_tokens": 3},
        {"prompt": "three", "samples": 2, "stop": ["e"], "logit_bias": {"120": 2.5}},
        {"prompt": "four", "seed": 9, "top_k": 5, "banned": [97]},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in given))
    words = ["sample", trained, "--file", source, "--output", target, "--max-tokens", 8]
    assert run(*words)[0] == 0
    whole = sorted(lines_of(target), key=lambda one: (one["line"], one["sample"]))
    assert [(one["line"], one["sample"]) for one in whole] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (2, 1),
        (3, 0),
    ]
    # Lines that are there stay; a line cut off in the middle is made again, the same.
    kept = target.read_text().splitlines(keepends=True)
    target.write_text("".join(kept[:1]) + kept[1][:10])
    code, _, err = run(*words)
    assert code == 0
    assert "lines are done" in err
    again = sorted(lines_of(target), key=lambda one: (one["line"], one["sample"]))
    assert again == whole
    before = target.read_bytes()
    assert run(*words)[0] == 0
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": 3}', 'line 2: requires "prompt"'),
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: must be an object"),
        (
            '{"prompt": "x", "temprature": 1}',
            "line 2: 'temprature': unknown setting; known: .*temperature",
        ),
        ('{"prompt": "x", "temperature": "hot"}', "line 2: temperature='hot': must be a number"),
        ('{"prompt": "x", "top_p": 7}', "line 2: top_p=7: .*at most 1"),
        ('{"prompt": "x", "max_tokens": 2.5}', "line 2: max_tokens=2.5: must be an integer"),
        ('{"prompt": "x", "stop": [1]}', r"line 2: stop=\[1\]: must be a text"),
        ('{"prompt": "x", "seed": true}', "line 2: seed=True: must be an integer"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_before_a_model_is_opened(
    run, tmp_path: Path, line: str, problem: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "fine"}\n' + line + "\n")
    words = ["sample", tmp_path / "absent", "--file", source, "--output", tmp_path / "out.jsonl"]
    code, _, err = run(*words)
    assert code == 65
    assert re.search(problem, sentence(err)), err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--beams", "3", "--stop", "x", "--seed", "1"], "--stop: has no effect with --beams"),
        (["--length-penalty", "2"], "--length-penalty: has no effect without --beams"),
        (["--interactive", "--samples", "2"], "--samples: has no effect with --interactive"),
        (["--bench", "--top-k", "2"], "--top-k: has no effect with --bench"),
    ],
)
def test_an_option_that_would_not_be_heeded_is_refused(run, tmp_path, words, problem) -> None:
    code, _, err = run("sample", tmp_path / "absent", *words)
    assert code == 2
    assert problem in err


def test_a_bias_is_spelled_as_the_help_says(run, tmp_path) -> None:
    code, _, err = run("sample", tmp_path / "absent", "--logit-bias", "abc")
    assert code == 2
    assert "'abc' must be a token's number and a bias, such as 50=-2" in err


@pytest.mark.parametrize("contents", ["notes of mine", "one\ntwo", '{"a": 1}\n{"b"'])
def test_a_file_that_holds_no_results_is_left_as_it_is(run, tmp_path: Path, contents) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "notes.txt"
    source.write_text('{"prompt": "x"}\n')
    target.write_text(contents)
    words = ["sample", tmp_path / "absent", "--file", source, "--output"]
    code, _, err = run(*words, target)
    assert code == 65
    assert str(target) in sentence(err)
    assert target.read_text() == contents
    source.write_text('{"prompt": "x"}')
    assert run(*words, source)[0] == 73
    assert source.read_text() == '{"prompt": "x"}'


def test_results_of_other_settings_are_not_mixed_with_new_ones(
    run, trained, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "one\u2028\x85"}\n\n{"prompt": "two"}\n')
    words = ["sample", trained, "--file", source, "--output", target, "--max-tokens", 4]
    assert run(*words)[0] == 0
    assert {one["line"] for one in lines_of(target)} == {0, 2}
    code, _, err = run(*words, "--temperature", 0.1)
    assert code == 65
    assert "has results of line" in sentence(err)
    first = {(one["line"], one["sample"]): one for one in lines_of(target)}
    assert run(*words, "--samples", 3)[0] == 0  # more of the same are added
    both = {(one["line"], one["sample"]): one for one in lines_of(target)}
    assert len(lines_of(target)) == len(both) == 6
    assert both | first == both


def test_every_line_that_the_model_cannot_take_is_named(run, trained, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    long = json.dumps({"prompt": "x" * 90})
    source.write_text(f'{long}\n{{"prompt": "fine"}}\n{{"prompt": []}}\n')
    code, _, err = run(
        "sample", trained, "--file", source, "--output", tmp_path / "out", "--max-tokens", 4
    )
    assert code == 65
    assert re.search(r"line 1: .*91 tokens.*\n.*line 3: .*is empty", err)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--file", "in.jsonl"], "--file and --output: give both"),
        (["--beams", "3", "--interactive"], "--beams=3: goes with --prompt only"),
        (["--beams", "2", "--samples", "3"], "returned=3: must be from 1 to width=2"),
        (["--rows", "0"], "--rows=0: must be at least 1"),
        (["--min-p", "1"], "min_p=1.0: must be at least 0 and below 1"),
        (["--stop", ""], "stop='': must not be empty"),
        (["--logprobs", "50"], "logprobs=50: must be from 0 to 20"),
    ],
)
def test_options_that_make_no_sense_are_told_before_a_model_is_opened(
    run, tmp_path, words, problem
):
    code, _, err = run("sample", tmp_path / "absent", *words)
    assert code == 2
    assert re.search(problem, sentence(err)), err


def test_a_prompt_too_long_for_the_context_is_told(run, trained) -> None:
    code, _, err = run("sample", trained, "--prompt", "x" * 100)
    assert code == 2
    assert "101 tokens, which leave no space in model.context=64" in sentence(err)


def test_a_conversation_streams_a_continuation_for_each_line(
    run, trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["ab", "x" * 100, "ab"])

    def ask(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    words = ["sample", trained, "--temperature", 0, "--max-tokens", 5]
    code, out, err = run(*words, "--interactive")
    assert code == 0
    assert "no space in model.context=64" in err  # and goes on
    first, empty, second = out.splitlines()
    assert first == second
    assert empty == ""
    assert run(*words, "--prompt", "ab")[1] == f"ab{first}\n"


def test_a_hugging_face_folder_is_sampled_as_it_is(run, trained, tmp_path: Path) -> None:
    from gptjax.checkpoint import run_dir as runs
    from gptjax.hf import safetensors
    from gptjax.parallel import mesh

    cfg, folder = config.load(trained), tmp_path / "hf"
    folder.mkdir()
    with mesh.entered_mesh(cfg):
        params, _ = runs.restore_params(trained, cfg)
        safetensors.write_folder(folder, params, cfg.model)
    words = ["--temperature", 0, "--max-tokens", 5]
    code, _, err = run("sample", folder, *words, "--prompt", "ab")
    assert code == 65
    assert "no tokenizer" in err  # bytes have no file there
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": [256, 97, 98]}')
    for place in (folder, trained):
        out = tmp_path / f"{place == folder}.jsonl"
        assert run("sample", place, *words, "--file", source, "--output", out)[0] == 0
    assert len(lines_of(tmp_path / "True.jsonl")[0]["ids"]) == 5
    assert lines_of(tmp_path / "False.jsonl")[0]["text"]


# --- as a process ----------------------------------------------------------------------------


def test_the_module_exits_with_the_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gptjax", "config", tmp_path / "absent.py"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no such file" in sentence(done.stderr)
    assert done.stdout == ""


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "gptjax", "config", QUICKSTART],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
