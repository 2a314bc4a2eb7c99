"""GPT-1 and GPT-2: the configuration and the tensors of their Hugging Face checkpoints."""

import functools

from gptjax.config import ModelConfig
from gptjax.hf.mapping import (
    TensorMapping,
    concatenated_qkv,
    embedding,
    linear,
    norm,
    unchanged,
    vector,
)
from gptjax.hf.reader import BUFFERS, ConfigReader, Family, Json, unless_default


def _read_gpt(c: ConfigReader, *, activation_key: str, post_norm: bool) -> ModelConfig:
    """The model of a config.json. GPT-1 normalises after the residual (post-norm), GPT-2 before."""
    embed = c.require("n_embd")
    # GPT-1's "gelu" is the tanh approximation as well.
    names = ("gelu_new", "gelu") if post_norm else ("gelu_new", "gelu_pytorch_tanh")
    c.one_of(activation_key, *names, default=names[post_norm])
    if not post_norm:
        c.one_of("scale_attn_weights", True, default=True)
        c.one_of("scale_attn_by_inverse_layer_idx", False, default=False)
        c.one_of("add_cross_attention", False, default=False)
    return ModelConfig(
        vocab_size=c.require("vocab_size"),
        context=c.require("n_positions"),
        layers=c.require("n_layer"),
        embed=embed,
        heads=c.require("n_head"),
        mlp=None if post_norm else unless_default(c.get("n_inner", 4 * embed), 4 * embed),
        norm_eps=c.number("layer_norm_epsilon", 1e-5),
        norm_position="post" if post_norm else "pre",
        tied_embeddings=c.flag("tie_word_embeddings", default=True),
    )


def _write_gpt(m: ModelConfig, own: Json) -> Json:
    """The config.json of a model; `own` are the keys that GPT-1 and GPT-2 do not share."""
    return own | {
        "vocab_size": m.vocab_size,
        "n_positions": m.context,
        "n_layer": m.layers,
        "n_embd": m.embed,
        "n_head": m.heads,
        "layer_norm_epsilon": m.norm_eps,
        "tie_word_embeddings": m.tied_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), m.dropout),
    }


def _gpt_mappings(
    m: ModelConfig, *, embed: str, positions: str, final_norm: str | None
) -> list[TensorMapping]:
    """All tensors, given the names of those that GPT-1 and GPT-2 name differently."""
    conv1d = functools.partial(linear, conv1d=True)
    h = "transformer.h.{i}"
    mappings = [
        embedding(f"transformer.{embed}.weight", "embed", m),
        unchanged(f"transformer.{positions}.weight", "positions"),
        *norm(f"{h}.ln_1", "norm_attn", m),
        *norm(f"{h}.ln_2", "norm_mlp", m),
        concatenated_qkv(f"{h}.attn.c_attn.weight", m),
        concatenated_qkv(f"{h}.attn.c_attn.bias", m, "_bias"),
        conv1d(f"{h}.attn.c_proj.weight", "attn/o", (m.heads, m.head, m.embed), input_dims=2),
        vector(f"{h}.attn.c_proj.bias", "attn/o_bias"),
        conv1d(f"{h}.mlp.c_fc.weight", "mlp/up", (m.embed, m.hidden)),
        vector(f"{h}.mlp.c_fc.bias", "mlp/up_bias"),
        conv1d(f"{h}.mlp.c_proj.weight", "mlp/down", (m.hidden, m.embed)),
        vector(f"{h}.mlp.c_proj.bias", "mlp/down_bias"),
    ]
    if final_norm:
        mappings += norm(f"transformer.{final_norm}", "norm_final", m)
    if not m.tied_embeddings:
        mappings.append(embedding("lm_head.weight", "head", m))
    return mappings


FAMILIES: dict[str, Family] = {
    "openai-gpt": Family(
        "OpenAIGPTLMHeadModel",
        "transformer.",
        lambda c: _read_gpt(c, activation_key="afn", post_norm=True),
        lambda m: _write_gpt(m, {"afn": "gelu"}),
        lambda m: _gpt_mappings(
            m, embed="tokens_embed", positions="positions_embed", final_norm=None
        ),
        BUFFERS,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.",
        lambda c: _read_gpt(c, activation_key="activation_function", post_norm=False),
        lambda m: _write_gpt(m, {"activation_function": "gelu_new", "n_inner": m.mlp}),
        lambda m: _gpt_mappings(m, embed="wte", positions="wpe", final_norm="ln_f"),
        BUFFERS,
    ),
}
