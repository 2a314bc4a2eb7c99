"""Llama, Mistral, Mixtral and Qwen3: their Hugging Face configurations and tensors.

Shapes: D embed, H query heads, K key heads, R = H/K, C head_dim, F hidden, E experts.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gptjax.config import ModelConfig, MoeConfig
from gptjax.errors import MismatchError
from gptjax.hf.mapping import TensorMapping, matrix, norm, table, vector
from gptjax.hf.reader import BUFFERS, Family, Json, Reader, unless_default
from gptjax.hf.rope import read_rope, write_rope


def _llama(
    c: Reader,
    *,
    biases: bool = False,
    theta: float | None = None,
    windows: Sequence[bool] = (False,),
    qk_norm: bool = False,
) -> ModelConfig:
    """Llama, and what has grown from it. `windows`: which layers have a window."""
    c.demand("hidden_act", "silu", default="silu")
    embed, heads = c.need("hidden_size"), c.need("num_attention_heads")
    allowed = (False, True) if biases else (False,)
    linear_bias = c.demand("attention_bias", *allowed, default=False)
    if c.demand("mlp_bias", *allowed, default=False) != linear_bias:
        raise MismatchError(f"{c.place}: attention_bias and mlp_bias differ; here both or neither")
    return ModelConfig(
        vocab_size=c.need("vocab_size"),
        context=c.need("max_position_embeddings"),
        layers=c.need("num_hidden_layers"),
        embed=embed,
        heads=heads,
        kv_heads=unless_default(c.get("num_key_value_heads", heads), heads),
        head_dim=unless_default(c.get("head_dim", embed // heads), embed // heads),
        mlp=unless_default(c.need("intermediate_size"), 4 * embed),
        activation="swiglu",
        norm="rmsnorm",
        norm_eps=float(c.need("rms_norm_eps")),
        qk_norm=qk_norm,
        positions="rope",
        rope=read_rope(c, theta),
        window=c.need("sliding_window") if any(windows) else None,
        pattern=_pattern(windows),
        linear_bias=linear_bias,
        tied_embeddings=bool(c.get("tie_word_embeddings", False)),
    )


def _pattern(windows: Sequence[bool]) -> tuple[Any, ...]:
    """The shortest pattern that repeats to these layers."""
    kinds = tuple("window" if w else "full" for w in windows)
    lengths = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    return next(kinds[:n] for n in lengths if kinds == kinds[:n] * (len(kinds) // n))


def _mistral_windows(c: Reader) -> Sequence[bool]:
    if "sliding_window" not in c.values:  # where absent, it stands for a number
        c.need("sliding_window")
    return (c.get("sliding_window") is not None,)


def _qwen_windows(c: Reader, *, by_layer: bool) -> Sequence[bool]:
    used = bool(c.get("use_sliding_window", False))
    if not by_layer:
        return (used,)
    layers, first = c.need("num_hidden_layers"), c.get("max_window_layers", 28)
    kinds = c.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    return [used and kind == "sliding_attention" for kind in kinds]


def _mixture(c: Reader, model: ModelConfig, **moe: Any) -> ModelConfig:
    """Theirs is a balance loss that is top_k where all is even, ours one that is 1."""
    top_k = c.need("num_experts_per_tok")
    balance = top_k * float(c.get("router_aux_loss_coef", 0.001))
    return replace(model, moe=MoeConfig(top_k=top_k, balance_loss=balance, **moe))


def _qwen3_moe(c: Reader) -> ModelConfig:
    c.demand("decoder_sparse_step", 1, default=1)
    c.demand("mlp_only_layers", [], default=[])
    model = _llama(c, qk_norm=True, windows=_qwen_windows(c, by_layer=False))
    return _mixture(
        c,
        model,
        experts=c.get("num_experts") or c.need("num_local_experts"),
        hidden=unless_default(c.need("moe_intermediate_size"), model.hidden),
        normalize=bool(c.get("norm_topk_prob", False)),
    )


def _llama_config(m: ModelConfig, experts: str = "num_local_experts") -> Json:
    values = {
        "vocab_size": m.vocab_size,
        "max_position_embeddings": m.context,
        "num_hidden_layers": m.layers,
        "hidden_size": m.embed,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv,
        "head_dim": m.head,
        "intermediate_size": m.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": m.norm_eps,
        **write_rope(m.rope),
        "attention_bias": m.linear_bias,
        "mlp_bias": m.linear_bias,
        "tie_word_embeddings": m.tied_embeddings,
    }
    if m.moe.experts:
        values |= {
            "num_experts_per_tok": m.moe.top_k,
            experts: m.moe.experts,
            "router_aux_loss_coef": m.moe.balance_loss / m.moe.top_k,
        }
    return values


def _qwen_window_config(m: ModelConfig, *, by_layer: bool) -> Json:
    values: Json = {"use_sliding_window": "window" in m.pattern, "sliding_window": m.window}
    if by_layer:
        kinds = m.pattern * (m.layers // len(m.pattern))
        names = {"window": "sliding_attention", "full": "full_attention"}
        values["layer_types"] = [names[kind] for kind in kinds]
    return values


def _llama_pieces(m: ModelConfig, experts: Mapping[str, str] | None = None) -> list[TensorMapping]:
    """With `experts`, the names of the router and of an expert's three matrices."""
    layer = "model.layers.{i}"
    attn = f"{layer}.self_attn"
    pieces = [
        table("model.embed_tokens.weight", "embed", m),
        *norm("model.norm", "norm_final", m),
        *norm(f"{layer}.input_layernorm", "norm_attn", m),
        *norm(f"{layer}.post_attention_layernorm", "norm_mlp", m),
        matrix(f"{attn}.o_proj.weight", "attn/o", (m.heads, m.head, m.embed), inputs=2),
    ]
    for name, heads in (("q", m.heads), ("k", m.kv), ("v", m.kv)):
        shape = (m.embed, heads, m.head)
        pieces.append(matrix(f"{attn}.{name}_proj.weight", f"attn/{name}", shape))
        if m.linear_bias:
            pieces.append(vector(f"{attn}.{name}_proj.bias", f"attn/{name}_bias", shape[1:]))
    if m.linear_bias:
        pieces.append(vector(f"{attn}.o_proj.bias", "attn/o_bias"))
    if m.qk_norm:
        pieces += [vector(f"{attn}.{n}_norm.weight", f"attn/{n}_scale") for n in "qk"]
    into, out = (m.embed, m.hidden), (m.hidden, m.embed)
    if experts is None:
        for name, shape in (("gate", into), ("up", into), ("down", out)):
            theirs = f"{layer}.mlp.{name}_proj"
            pieces.append(matrix(f"{theirs}.weight", f"mlp/{name}", shape))
            if m.linear_bias:
                pieces.append(vector(f"{theirs}.bias", f"mlp/{name}_bias"))
    else:
        into, out = (m.embed, m.expert_hidden), (m.expert_hidden, m.embed)
        shapes = {"router": (m.embed, m.moe.experts), "gate": into, "up": into, "down": out}
        pieces += [
            matrix(f"{layer}.{theirs}.weight", f"mlp/{name}", shapes[name])
            for name, theirs in experts.items()
        ]
    if not m.tied_embeddings:
        pieces.append(table("lm_head.weight", "head", m))
    return pieces


_MIXTRAL = "block_sparse_moe"
_LLAMA_LIKE = functools.partial(Family, prefix="model.", ignored=BUFFERS)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_LIKE(
        "LlamaForCausalLM",
        to_model=lambda c: _llama(c, biases=True, theta=10000.0),
        to_config=_llama_config,
        pieces=_llama_pieces,
    ),
    "mistral": _LLAMA_LIKE(
        "MistralForCausalLM",
        to_model=lambda c: _llama(c, windows=_mistral_windows(c)),
        to_config=lambda m: _llama_config(m) | {"sliding_window": m.window},
        pieces=_llama_pieces,
    ),
    "qwen3": _LLAMA_LIKE(
        "Qwen3ForCausalLM",
        to_model=lambda c: _llama(c, qk_norm=True, windows=_qwen_windows(c, by_layer=True)),
        to_config=lambda m: _llama_config(m) | _qwen_window_config(m, by_layer=True),
        pieces=_llama_pieces,
    ),
    "mixtral": _LLAMA_LIKE(
        "MixtralForCausalLM",
        to_model=lambda c: _mixture(
            c,
            _llama(c, windows=(c.get("sliding_window") is not None,)),
            experts=c.need("num_local_experts"),
        ),
        to_config=lambda m: (
            _llama_config(m) | {"sliding_window": m.window, "intermediate_size": m.expert_hidden}
        ),
        pieces=lambda m: _llama_pieces(
            m,
            {
                "router": f"{_MIXTRAL}.gate",
                "gate": f"{_MIXTRAL}.experts.{{e}}.w1",
                "up": f"{_MIXTRAL}.experts.{{e}}.w3",
                "down": f"{_MIXTRAL}.experts.{{e}}.w2",
            },
        ),
    ),
    "qwen3_moe": _LLAMA_LIKE(
        "Qwen3MoeForCausalLM",
        to_model=_qwen3_moe,
        to_config=lambda m: (
            _llama_config(m, "num_experts")
            | _qwen_window_config(m, by_layer=False)
            | {"moe_intermediate_size": m.expert_hidden, "norm_topk_prob": m.moe.normalize}
        ),
        pieces=lambda m: _llama_pieces(
            m,
            {"router": "mlp.gate"}
            | {n: f"mlp.experts.{{e}}.{n}_proj" for n in ("gate", "up", "down")},
        ),
    ),
}
