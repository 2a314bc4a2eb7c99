"""Falcon: the configuration and the tensors of its Hugging Face checkpoints."""

from typing import Any

from gptjax.config import ModelConfig, RopeConfig
from gptjax.hf.mapping import TensorMapping, embedding, grouped_qkv, linear, norm, vector
from gptjax.hf.reader import BUFFERS, ConfigReader, Family, Json, unless_default
from gptjax.hf.rope import read_rope, write_rope

# ModelConfig.activation by the name that `transformers` has for it.
_ACTIVATIONS: dict[str, Any] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATION_NAMES = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}


def _read_falcon(c: ConfigReader) -> ModelConfig:
    """The model of a config.json. `new_decoder_architecture` is that of 40B and later models:
    grouped keys, a parallel residual and, but for 11B, a norm for each of its branches.
    """
    embed, heads = c.require("hidden_size"), c.require("num_attention_heads")
    grouped, alibi = bool(c.get("new_decoder_architecture", False)), bool(c.get("alibi", False))
    parallel = grouped or bool(c.get("parallel_attn", True))
    kv = heads
    if grouped:
        kv = c.get("num_kv_heads", heads)
    elif c.get("multi_query", True):
        kv = 1
    norms = c.get("num_ln_in_parallel_attn") or (2 if grouped else 1)
    c.one_of("apply_residual_connection_post_layernorm", False, default=False)
    return ModelConfig(
        vocab_size=c.require("vocab_size"),
        context=c.get("max_position_embeddings", 2048),
        layers=c.require("num_hidden_layers"),
        embed=embed,
        heads=heads,
        kv_heads=unless_default(kv, heads),
        mlp=unless_default(c.get("ffn_hidden_size", 4 * embed), 4 * embed),
        activation=_ACTIVATIONS[c.one_of("activation", *_ACTIVATIONS, default="gelu")],
        norm_eps=c.number("layer_norm_epsilon", 1e-5),
        residual="parallel" if parallel else "sequential",
        shared_norm=parallel and norms == 1,
        positions="alibi" if alibi else "rope",
        rope=RopeConfig() if alibi else read_rope(c, 10000.0),
        alibi="scaled_bf16" if alibi else "exact",
        linear_bias=bool(c.get("bias", False)),
        tied_embeddings=c.flag("tie_word_embeddings", default=True),
    )


def _write_falcon(m: ModelConfig) -> Json:
    """The config.json of a model; "?" for an activation that Falcon does not have."""
    parallel = m.residual == "parallel"
    grouped = parallel and (m.kv not in (1, m.heads) or not m.shared_norm)
    return {
        "vocab_size": m.vocab_size,
        "max_position_embeddings": m.context,
        "num_hidden_layers": m.layers,
        "hidden_size": m.embed,
        "num_attention_heads": m.heads,
        "num_kv_heads": m.kv,
        "multi_query": m.kv == 1 and not grouped,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": (1 if m.shared_norm else 2) if grouped else None,
        "parallel_attn": parallel,
        "ffn_hidden_size": m.hidden,
        "activation": _ACTIVATION_NAMES.get(m.activation, "?"),
        "alibi": m.positions == "alibi",
        "bias": m.linear_bias,
        "layer_norm_epsilon": m.norm_eps,
        **write_rope(m.rope),
        "tie_word_embeddings": m.tied_embeddings,
        "hidden_dropout": m.dropout,
        "attention_dropout": m.dropout,
    }


def _falcon_mappings(m: ModelConfig) -> list[TensorMapping]:
    h = "transformer.h.{i}"
    norm_attn, norm_mlp = "input_layernorm", "post_attention_layernorm"
    if m.residual == "parallel" and not m.shared_norm:
        norm_attn, norm_mlp = "ln_attn", "ln_mlp"
    attn, mlp = f"{h}.self_attention", f"{h}.mlp"
    mappings = [
        embedding("transformer.word_embeddings.weight", "embed", m),
        *norm("transformer.ln_f", "norm_final", m),
        *norm(f"{h}.{norm_attn}", "norm_attn", m),
        *([] if m.shared_norm else norm(f"{h}.{norm_mlp}", "norm_mlp", m)),
        grouped_qkv(f"{attn}.query_key_value.weight", m),
        linear(f"{attn}.dense.weight", "attn/o", (m.heads, m.head, m.embed), input_dims=2),
        linear(f"{mlp}.dense_h_to_4h.weight", "mlp/up", (m.embed, m.hidden)),
        linear(f"{mlp}.dense_4h_to_h.weight", "mlp/down", (m.hidden, m.embed)),
    ]
    if m.linear_bias:
        mappings += [
            grouped_qkv(f"{attn}.query_key_value.bias", m, "_bias"),
            vector(f"{attn}.dense.bias", "attn/o_bias"),
            vector(f"{mlp}.dense_h_to_4h.bias", "mlp/up_bias"),
            vector(f"{mlp}.dense_4h_to_h.bias", "mlp/down_bias"),
        ]
    if not m.tied_embeddings:
        mappings.append(embedding("lm_head.weight", "head", m))
    return mappings


FAMILIES: dict[str, Family] = {
    "falcon": Family(
        "FalconForCausalLM",
        "transformer.",
        _read_falcon,
        _write_falcon,
        _falcon_mappings,
        BUFFERS,
    ),
}
