"""Adapters in PEFT's format: round trips, and (slow) the logits of PEFT itself."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import ComputeConfig, LoraConfig, ModelConfig, MoeConfig
from gptjax.errors import DataError, MismatchError
from gptjax.finetune import lora, peft
from gptjax.hf import safetensors
from gptjax.model import decoder
from gptjax.parallel import sharding

pytestmark = pytest.mark.usefixtures("quick_compile")

GPT = ModelConfig(vocab_size=99, context=64, layers=2, embed=32, heads=8, mlp=80)
LLAMA = replace(
    GPT,
    activation="swiglu",
    kv_heads=2,
    head_dim=8,
    mlp=48,
    norm="rmsnorm",
    positions="rope",
    linear_bias=False,
    tied_embeddings=False,
)
WINDOWS = replace(LLAMA, layers=4, qk_norm=True, window=7, pattern=("full", "window"))
FALCON = replace(
    LLAMA, activation="gelu", norm="layernorm", residual="parallel", mlp=None, head_dim=None
)
MODELS = {"gpt2": GPT, "llama": LLAMA, "qwen3": WINDOWS, "falcon": FALCON}
TARGETS = {
    "gpt2": ("blocks/.*/attn/[qkvo]", "blocks/.*/mlp/(up|down)"),
    "gpt2, some": ("blocks/.*/attn/[qv]", "blocks/.*/mlp/down"),
    "llama": ("blocks/.*/attn/[qkvo]", "blocks/.*/mlp/(gate|up|down)"),
    "qwen3": ("blocks/layer_1/attn/[qo]",),
    "falcon": ("blocks/.*/attn/[kvo]", "blocks/.*/mlp/up"),
}
CASES = pytest.mark.parametrize("case", list(TARGETS))


def of(case, **fields):
    return MODELS[case.split(",")[0]], LoraConfig(
        rank=3, alpha=5.0, targets=TARGETS[case], **fields
    )


@pytest.fixture
def adapters_of(random_params):
    """Draws adapters that are nowhere zero, and the base."""

    def make(model, cfg):
        params = random_params(model, 0.1)
        abstract = sharding.abstract(lambda: lora.init(params, cfg, jax.random.key(0)))
        rng = np.random.default_rng(5)
        draw = lambda x: jax.device_put(np.float32(rng.normal(0, 0.2, x.shape)), x.sharding)
        return params, jax.tree.map(draw, abstract)

    return make


@CASES
def test_round_trip_is_bit_exact(on_mesh, adapters_of, tmp_path, case):
    model, cfg = of(case, rslora=True)
    with on_mesh():
        _, adapters = adapters_of(model, cfg)
        peft.write_folder(tmp_path, adapters, cfg, model)
        host = leaves_by_path(jax.device_get(adapters))
    mesh = (1, 2, 2) if model.kv > 1 else (1, 4, 1)
    with on_mesh(*mesh):
        back, again = peft.read_folder(tmp_path, model)
        found = leaves_by_path(back)
    assert again.scale == pytest.approx(cfg.scale, rel=1e-6)
    assert again.rank == cfg.rank
    assert set(found) == set(host)
    for path, value in found.items():
        np.testing.assert_array_equal(value, host[path], err_msg=path)


def test_fused_adapter_has_the_sum_of_the_ranks_and_is_block_diagonal(
    on_mesh, adapters_of, tmp_path
):
    model, cfg = of("gpt2, some")
    with on_mesh():
        _, adapters = adapters_of(model, cfg)
        peft.write_folder(tmp_path, adapters, cfg, model, "some/base")
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert config["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert config["rank_pattern"] == {"c_attn": 6}
    assert (config["lora_alpha"], config["alpha_pattern"]) == (5, {"c_attn": 10})
    assert config["base_model_name_or_path"] == "some/base"
    b = load_file(tmp_path / peft.TENSORS)[
        "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
    ]
    nonzero = b.reshape(3, 32, 2, 3).any((1, 3))
    np.testing.assert_array_equal(nonzero, [[True, False], [False, False], [False, True]])


def test_layers_with_different_fused_ranks_are_named_one_by_one(on_mesh, adapters_of, tmp_path):
    model = replace(GPT, pattern=("full", "full"))
    cfg = LoraConfig(rank=3, targets=("blocks/layer_0/attn/[qkv]", "blocks/layer_1/attn/[kv]"))
    with on_mesh():
        _, adapters = adapters_of(model, cfg)
        peft.write_folder(tmp_path, adapters, cfg, model)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert config["rank_pattern"] == {
        "0.attn.c_attn": 9,
        "1.attn.c_attn": 6,
    }
    assert config["target_modules"] == ["0.attn.c_attn", "1.attn.c_attn"]


def test_unsupported_settings_and_tensors_are_errors(on_mesh, adapters_of, tmp_path):
    model, cfg = of("llama")
    with on_mesh():
        _, adapters = adapters_of(model, cfg)
        peft.write_folder(tmp_path, adapters, cfg, model)
        config = json.loads((tmp_path / peft.CONFIG).read_text())
        assert (tmp_path / peft.TENSORS).stat().st_mode == (tmp_path / peft.CONFIG).stat().st_mode
        changed_bases = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        for change in (
            {"use_dora": True},
            {"peft_type": "IA3"},
            {"bias": "all"},
            {"a_new_trick": 3},
            *({"init_lora_weights": begun} for begun in changed_bases),
        ):
            (tmp_path / peft.CONFIG).write_text(json.dumps(config | change))
            with pytest.raises(MismatchError, match=f"not supported:\n.*{min(change)}"):
                peft.read_folder(tmp_path, model)
        harmless = {
            "init_lora_weights": "gaussian",
            "a_new_trick": None,
            "layers_pattern": "layers",
        }
        (tmp_path / peft.CONFIG).write_text(json.dumps(config | harmless))
        tensors = load_file(tmp_path / peft.TENSORS)
        missing = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
        save_file({k: v for k, v in tensors.items() if k != missing}, tmp_path / peft.TENSORS)
        with pytest.raises(
            MismatchError, match=r"no pairs of the model.s modules:\n.*up_proj\.lora_A"
        ):
            peft.read_folder(tmp_path, model)
        save_file(tensors, tmp_path / peft.TENSORS)
        with pytest.raises(MismatchError, match=r"is of another model:\n.*down_proj"):
            peft.read_folder(tmp_path, replace(model, mlp=64))
        (tmp_path / peft.TENSORS).write_bytes(b"")
        with pytest.raises(DataError, match="cannot be read as PEFT's adapters"):
            peft.read_folder(tmp_path, model)

        experts = replace(LLAMA, moe=MoeConfig(experts=4))
        targets = LoraConfig(rank=2, targets=("blocks/.*/mlp/(gate|router)",))
        _, adapters = adapters_of(experts, targets)
        with pytest.raises(MismatchError, match="there are some of mlp/gate, mlp/router"):
            peft.write_folder(tmp_path, adapters, targets, experts)


# --- against PEFT itself -----------------------------------------------------------------------

TOKENS = np.random.default_rng(0).integers(0, 99, (1, 20)).astype(np.int32)


def our_logits(params, model):
    def logits(params, ids_BT):
        x_ND = decoder.apply(params, model, ComputeConfig(), ids_BT).x_ND
        return decoder.logits(params, model, x_ND)[:, : model.vocab_size]

    return np.asarray(jax.jit(logits)(params, jnp.asarray(TOKENS)))


def their_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits[0].numpy()


def their_base(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.slow
@CASES
def test_exported_adapters_have_the_same_logits_in_peft(on_mesh, adapters_of, tmp_path, case):
    theirs = pytest.importorskip("peft")
    model, cfg = of(case, rslora=case == "llama")
    (tmp_path / "base").mkdir()
    with on_mesh():
        params, adapters = adapters_of(model, cfg)
        safetensors.write_folder(tmp_path / "base", params, model)
        peft.write_folder(tmp_path, adapters, cfg, model, str(tmp_path / "base"))
        merge = jax.jit(lambda p, a: lora.merge_adapters(p, a, cfg))
        base, want = our_logits(params, model), our_logits(merge(params, adapters), model)
    adapted = theirs.PeftModel.from_pretrained(their_base(tmp_path / "base"), tmp_path)
    assert np.abs(want - base).max() > 0.1
    np.testing.assert_allclose(their_logits(adapted), want, atol=1e-4)
    np.testing.assert_allclose(their_logits(adapted.merge_and_unload()), want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 3}}),
        ("llama", {"target_modules": ["k_proj"], "layers_to_transform": [1]}),
        ("falcon", {"target_modules": ["query_key_value"], "rank_pattern": {"h.1.*": 2}}),
    ],
)
def test_imported_adapters_of_peft_have_the_same_logits(
    on_mesh, random_params, tmp_path, name, fields
):
    theirs = pytest.importorskip("peft")
    import torch

    model = MODELS[name]
    (tmp_path / "base").mkdir()
    with on_mesh():
        params = random_params(model, 0.1)
        safetensors.write_folder(tmp_path / "base", params, model)
        config = theirs.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **fields)
        adapted = theirs.get_peft_model(their_base(tmp_path / "base"), config)
        torch.manual_seed(0)
        with torch.no_grad():
            for key, value in adapted.named_parameters():
                if "lora_" in key:
                    value.normal_(0, 0.2)
        adapted.save_pretrained(tmp_path / "adapters")
        adapters, cfg = peft.read_folder(tmp_path / "adapters", model)
        merge = jax.jit(lambda p, a: lora.merge_adapters(p, a, cfg))
        base, got = our_logits(params, model), our_logits(merge(params, adapters), model)
    want = their_logits(adapted)
    assert np.abs(want - base).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4)
