"""A real pretrained model, SmolLM2-135M: its certificate, and its decoded tokens."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from fetch_manpages import fetch as fetch_manpages
from fetch_smollm2 import fetch

from gptjax.checkpoint import run_dir
from gptjax.cli import main
from gptjax.config import ComputeConfig
from gptjax.parallel import mesh
from gptjax.sample import BeamSearchParams, Sampler, SamplingParams

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a land far away,",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "Ünïcödé — 日本語 🙂:",
]


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """One device for the commands: eight virtual ones gather all parameters eight times over."""
    only = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: only)
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smollm2")
    try:
        fetch(path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the model cannot be fetched here: {error}")
    return path


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("imported") / "run"
    assert main.main(["convert", "--no-compare", f"hf:{folder}", str(target)]) == 0
    return target


@pytest.mark.exhaustive  # test_transformers.py compares small models of every family
def test_certificate(folder, tmp_path):
    assert main.main(["convert", f"hf:{folder}", str(tmp_path / "run")]) == 0
    certificate = run_dir.certificate_of(str(tmp_path / "run"))
    compared = certificate["transformers"]
    print(f"\n{certificate}")
    assert certificate["tensors"] == 272
    assert certificate["round trip"] == "byte-equal"
    assert compared["last_position"] == 8191
    assert compared["argmax_agreement"] == 1.0
    assert compared["kl_nats_per_token"] < 1e-6
    assert compared["largest_difference"] < 5e-3  # of logits up to 36, at position 8191


def test_it_goes_on_training_on_text_that_it_does_not_know(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        fetch_manpages("manpages-de", tmp_path / "fetched")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"the text cannot be fetched here: {error}")
    pages = sorted((tmp_path / "fetched").iterdir())
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("".join(page.read_text() for page in pages[::90])[2000:5000])
    (tmp_path / "german").mkdir()
    for page in pages[1::30]:
        (tmp_path / "german" / page.name).write_text(page.read_text()[:3000])

    def bits_per_byte(model: str) -> float:
        capsys.readouterr()
        words = ["--text", str(held_out), "--length", "256", "--batch", "1", "--json"]
        assert main.main(["eval", model, *words]) == 0
        return json.loads(capsys.readouterr().out)["text_bits_per_byte"]

    before = bits_per_byte(f"hf:{folder}")
    words = ["--data.sources", "german", "--data.store", "store", "--run", "run"]
    words += ["--data.valid-fraction", "0.01", "--data.workers", "1"]
    words += ["--eval.every", "0", "--eval.batch", "4", "--eval.prompts"]
    words += ["--train.tokens", "3072", "--train.batch-tokens", "512", "--train.seq-len", "128"]
    words += ["--optim.lr", "1e-4", "--optim.warmup-tokens", "512", "--compute.dtype", "float32"]
    assert main.main(["train", "continued", "--start", f"hf:{folder}", *words]) == 0
    assert bits_per_byte("run") < before - 0.1
    assert main.main(["convert", "--no-compare", "run", "hf:exported"]) == 0
    assert "round trip: byte-equal" in capsys.readouterr().out


@pytest.fixture(scope="module")
def theirs(folder):
    """The public implementation's model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sampler(imported) -> Iterator[Sampler]:
    cfg, tokenizer, _ = run_dir.open_run(str(imported))
    with mesh.entered_mesh(cfg):
        params, _ = run_dir.restore_params(str(imported), cfg)
        yield Sampler(params, cfg.model, ComputeConfig(), tokenizer)


def test_greedy_tokens_equal_those_of_transformers(theirs, sampler):
    import torch

    model, their_tokenizer = theirs
    prompts = [sampler.ids(text) for text in PROMPTS]
    assert prompts == [their_tokenizer(text).input_ids for text in PROMPTS]
    got = sampler.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24))
    for prompt, one in zip(prompts, got, strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=their_tokenizer.eos_token_id,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert one.ids == out
        assert one.text == their_tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
def test_beams_equal_those_of_transformers(theirs, sampler, length_penalty):
    import torch

    model, their_tokenizer = theirs
    eos = their_tokenizer.eos_token_id
    prompts = [sampler.ids(text) for text in PROMPTS[:3]]
    got = sampler.beam(prompts, BeamSearchParams(4, length_penalty, returned=4, max_tokens=24))
    for i, prompt in enumerate(prompts):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=length_penalty,
            eos_token_id=eos,
            pad_token_id=eos,
            return_dict_in_generate=True,
            output_scores=True,
        )
        own = [one for one in got if one.prompt == i]
        for one, ids, score in zip(own, out.sequences, out.sequences_scores, strict=True):
            continued = ids[len(prompt) :].tolist()
            assert one.ids == continued[: len(one.ids)]
            assert set(continued[len(one.ids) :]) <= {eos}
            assert abs(one.score - score.item()) < 2e-3
