"""Every family and structural variant against `transformers`, on the same random weights.

Needs torch and transformers (`pip install -e '.[compare]'`). With -s it prints a line for each
variant, the figures of README.md's table of families.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import VARIANTS, build

from gptjax import sample
from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.cli import convert
from gptjax.config import ComputeConfig
from gptjax.hf import safetensors, verify
from gptjax.model import decoder
from gptjax.parallel import arrays, sharding
from gptjax.runtime.progress import Progress
from gptjax.training import loss

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

COMPUTE = ComputeConfig()
ROWS = 2


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request, tmp_path_factory):
    """The name, the model of `transformers`, and its opened folder."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = build(request.param, folder)
    return request.param, theirs, safetensors.open_source(folder)


def tokens(source, length=None) -> np.ndarray:
    shape = (ROWS, length or source.model.context)
    return np.random.default_rng(0).integers(0, source.model.vocab_size, shape).astype(np.int32)


def mean_loss(source, params, ids):
    """The mean cross-entropy of all tokens but the first."""
    model = source.model
    x_ND = decoder.apply(params, model, COMPUTE, ids[:, :-1]).x_ND
    flat = jax.lax.reshape(ids[:, 1:], (x_ND.shape[0],), out_sharding=sharding.spec("tokens"))
    ones = jnp.ones_like(flat, jnp.float32)
    ce, _ = loss.cross_entropy(
        x_ND, decoder.head(params), flat, ones, 0.0, 1, model.vocab_size, model.logit_soft_cap
    )
    return ce / flat.size


def test_logits_and_gradients_equal_those_of_transformers(
    on_mesh, variant, tmp_path, record_property
):
    import torch

    name, theirs, source = variant
    ids = tokens(source)
    given = torch.tensor(ids, dtype=torch.long)
    with torch.no_grad():
        want = theirs(given).logits.numpy()
    theirs(given, labels=given).loss.backward()
    with torch.no_grad():  # gradients take the place of the weights, to be saved under their names
        for parameter in theirs.parameters():
            parameter.data, parameter.grad = parameter.grad, parameter.data
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.data, parameter.grad = parameter.grad, None

    with on_mesh():
        params = safetensors.read_params(source)

        @jax.jit
        def ours(params, ids):
            x_ND = decoder.apply(params, source.model, COMPUTE, ids).x_ND
            return decoder.logits(params, source.model, x_ND)[:, : source.model.vocab_size]

        ids = arrays.global_batch(ids, ROWS)
        got = np.asarray(ours(params, ids)).reshape(want.shape)
        grads = jax.jit(jax.grad(lambda p, ids: mean_loss(source, p, ids)))(params, ids)
        grads = jax.device_get(grads)
        want_grads = jax.device_get(safetensors.read_params(safetensors.open_source(tmp_path)))
    difference = float(np.abs(got - want).max())
    relative = {}
    for path, g in leaves_by_path(want_grads).items():
        # A key's bias shifts all scores of a query equally: its gradient is rounding error.
        scale = np.abs(leaves_by_path(want_grads)[path.replace("k_bias", "k")]).max()
        relative[path] = float(np.abs(leaves_by_path(grads)[path] - g).max() / scale)
    record_property("difference", difference)
    print(
        f"\n{name:24} logits {difference:.1e} of {np.abs(want).max():.1f}, "
        f"gradients {max(relative.values()):.1e} relative"
    )
    assert difference < 1e-4
    assert max(relative.values()) < 1e-3, max(relative, key=relative.get)


def test_greedy_tokens_equal_those_of_transformers(on_mesh, variant):
    import torch

    _, theirs, source = variant
    prompts = [row[: 5 + 6 * i].tolist() for i, row in enumerate(tokens(source))]
    with on_mesh():
        params = safetensors.read_params(source)
        sampler = sample.Sampler(params, source.model, COMPUTE)
        got = sampler.generate(prompts, sample.SamplingParams(temperature=0.0, max_tokens=32))
    for prompt, continuation in zip(prompts, [one.ids for one in got], strict=True):
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert continuation == out[0, len(prompt) :].tolist()


def test_verification_reaches_the_end_of_the_context(on_mesh, variant):
    _, _, source = variant
    with on_mesh():
        params = safetensors.read_params(source)
        far = verify.compare_logits(source, params)
    assert far["last_position"] == source.model.context - 1
    assert far["largest_difference"] < 1e-4
    assert far["argmax_agreement"] == 1.0
    assert far["kl_nats_per_token"] < 1e-8


def test_verification_detects_a_wrong_rope_scaling_factor(on_mesh, tmp_path):
    build("llama3", tmp_path)
    source = safetensors.open_source(tmp_path)
    with on_mesh():
        params = safetensors.read_params(source)
        rope = replace(source.model.rope, factor=9.0)
        wrong = replace(source, model=replace(source.model, rope=rope))
        assert verify.compare_logits(wrong, params)["largest_difference"] > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_half_precision_export_is_verified_against_its_own_weights(name, tmp_path):
    folder, made, out = (tmp_path / part for part in ("hf", "run", "out"))
    build(name, folder)
    progress = Progress(shown=False)
    convert.import_run(str(folder), str(made), progress, compare=False)
    certificate = convert.export_run(str(made), str(out), progress, dtype="bfloat16")
    assert certificate["round trip"] == "byte-equal"
    assert certificate["transformers"]["largest_difference"] < 1e-4


def test_exported_folder_loads_in_transformers_with_equal_bits(on_mesh, variant, tmp_path):
    import torch
    import transformers

    _, theirs, source = variant
    with on_mesh():
        safetensors.write_folder(tmp_path, safetensors.read_params(source), source.model)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor(tokens(source), dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    assert json.loads((Path(tmp_path) / "config.json").read_text())["architectures"] == [
        source.family.architecture
    ]


ROPES = {
    "both, rope_scaling linear": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "both, a frequency beside them": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_theta": 700.0,
    },
    "both, yarn": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 900.0,
        },
    },
    "yarn, original length at the top": {
        "rope_parameters": None,
        "rope_theta": 700.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 32,
    },
    "llama3, another original length at the top": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "original_max_position_embeddings": 16,
    },
    "a frequency within and beside": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_theta": 700.0,
    },
    "linear and nothing else": {
        "rope_parameters": None,
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_settings_have_the_precedence_of_transformers(name, on_mesh, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | ROPES[name]
    values = {key: value for key, value in values.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    source = safetensors.open_source(tmp_path)
    ids = np.random.default_rng(0).integers(0, 200, (2, 100)).astype(np.int32)
    with torch.no_grad():
        want = torch.log_softmax(theirs(torch.tensor(ids)).logits, -1).numpy()
    with on_mesh():
        params = safetensors.read_params(source)
        hidden = decoder.apply(params, source.model, COMPUTE, jnp.array(ids))[0]
        got = jax.nn.log_softmax(decoder.logits(params, source.model, hidden), -1)
    got = np.asarray(got).reshape(2, 100, -1)[..., :200]
    np.testing.assert_allclose(got, want, atol=2e-4)
