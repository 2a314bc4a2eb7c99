"""Llama, Mistral, Mixtral and Qwen3: the configurations and the tensors of their checkpoints."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gptjax.config import ModelConfig, MoeConfig
from gptjax.errors import MismatchError
from gptjax.hf.mapping import TensorMapping, embedding, linear, norm, vector
from gptjax.hf.reader import BUFFERS, ConfigReader, Family, Json, unless_default
from gptjax.hf.rope import read_rope, write_rope


def _read_llama(
    c: ConfigReader,
    *,
    biases: bool = False,
    default_theta: float | None = None,
    windows: Sequence[bool] | None = None,
    qk_norm: bool = False,
) -> ModelConfig:
    """The model of a config.json of Llama or of a family derived from it.

    `biases`: linear layers may have them; `windows`: whether each layer's attention has a sliding
    window, of one layer for all; None: no layer has. Raises MismatchError for a value that is not
    supported.
    """
    c.one_of("hidden_act", "silu", default="silu")
    embed, heads = c.require("hidden_size"), c.require("num_attention_heads")
    windows = _one_window(c, False) if windows is None else windows
    allowed = (False, True) if biases else (False,)
    linear_bias = c.one_of("attention_bias", *allowed, default=False)
    if c.one_of("mlp_bias", *allowed, default=False) != linear_bias:
        raise MismatchError(
            f"{c.location}: attention_bias and mlp_bias differ; supported: both or neither"
        )
    return ModelConfig(
        vocab_size=c.require("vocab_size"),
        context=c.require("max_position_embeddings"),
        layers=c.require("num_hidden_layers"),
        embed=embed,
        heads=heads,
        kv_heads=unless_default(c.get("num_key_value_heads", heads), heads),
        head_dim=unless_default(c.get("head_dim", embed // heads), embed // heads),
        mlp=unless_default(c.require("intermediate_size"), 4 * embed),
        activation="swiglu",
        norm="rmsnorm",
        norm_eps=c.number("rms_norm_eps"),
        qk_norm=qk_norm,
        positions="rope",
        rope=read_rope(c, default_theta),
        window=c.require("sliding_window") if any(windows) else None,
        pattern=_pattern(windows),
        linear_bias=linear_bias,
        tied_embeddings=c.flag("tie_word_embeddings", default=False),
    )


def _pattern(windows: Sequence[bool]) -> tuple[Any, ...]:
    """The shortest pattern of attention kinds that these layers repeat."""
    kinds = tuple("window" if w else "full" for w in windows)
    lengths = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    return next(kinds[:n] for n in lengths if kinds == kinds[:n] * (len(kinds) // n))


def _mistral_windows(c: ConfigReader) -> Sequence[bool]:
    if "sliding_window" not in c.values:  # absent, it has the default of `transformers`, 4096
        c.require("sliding_window")
    return _one_window(c, c.get("sliding_window") is not None)


def _one_window(c: ConfigReader, windowed: bool) -> Sequence[bool]:
    """That all layers have a window, or none. Raises MismatchError where layer_types disagrees."""
    kind = "sliding_attention" if windowed else "full_attention"
    for given in c.get("layer_types", [kind]):
        if given != kind:
            raise MismatchError(
                f"{c.location}: layer_types has {given!r} where all layers of this model are "
                f"{kind!r}; not supported"
            )
    return (windowed,)


def _qwen_windows(c: ConfigReader, *, by_layer: bool) -> Sequence[bool]:
    """Whether each layer has a window; with `by_layer` layers may differ, as in Qwen3 and not in
    its mixtures.
    """
    enabled = bool(c.get("use_sliding_window", False))
    if not by_layer:
        return _one_window(c, enabled)
    layers, first = c.require("num_hidden_layers"), c.get("max_window_layers", 28)
    kinds = c.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    return [enabled and kind == "sliding_attention" for kind in kinds]


def _with_experts(c: ConfigReader, model: ModelConfig, **moe: Any) -> ModelConfig:
    """The model with its experts; `moe` are further fields of MoeConfig.

    With perfectly balanced experts the balance loss of `transformers` is top_k, and ours is 1.
    """
    top_k = c.require("num_experts_per_tok")
    balance = top_k * float(c.get("router_aux_loss_coef", 0.001))
    return replace(model, moe=MoeConfig(top_k=top_k, balance_loss=balance, **moe))


def _read_qwen3_moe(c: ConfigReader) -> ModelConfig:
    c.one_of("decoder_sparse_step", 1, default=1)
    c.one_of("mlp_only_layers", [], default=[])
    model = _read_llama(c, qk_norm=True, windows=_qwen_windows(c, by_layer=False))
    return _with_experts(
        c,
        model,
        experts=c.get("num_experts") or c.require("num_local_experts"),
        hidden=unless_default(c.require("moe_intermediate_size"), model.hidden),
        normalize=bool(c.get("norm_topk_prob", False)),
    )


def _write_llama(m: ModelConfig, experts_key: str = "num_local_experts") -> Json:
    """The config.json of a model; `experts_key` is the key of the number of experts."""
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
            experts_key: m.moe.experts,
            "router_aux_loss_coef": m.moe.balance_loss / m.moe.top_k,
        }
    return values


def _write_qwen_windows(m: ModelConfig, *, by_layer: bool) -> Json:
    values: Json = {"use_sliding_window": "window" in m.pattern, "sliding_window": m.window}
    if by_layer:
        kinds = m.pattern * (m.layers // len(m.pattern))
        names = {"window": "sliding_attention", "full": "full_attention"}
        values["layer_types"] = [names[kind] for kind in kinds]
    return values


def _llama_mappings(
    m: ModelConfig, experts: Mapping[str, str] | None = None
) -> list[TensorMapping]:
    """All tensors; of a mixture `experts` names those of the router and of an expert's matrices."""
    layer = "model.layers.{i}"
    attn = f"{layer}.self_attn"
    mappings = [
        embedding("model.embed_tokens.weight", "embed", m),
        *norm("model.norm", "norm_final", m),
        *norm(f"{layer}.input_layernorm", "norm_attn", m),
        *norm(f"{layer}.post_attention_layernorm", "norm_mlp", m),
        linear(f"{attn}.o_proj.weight", "attn/o", (m.heads, m.head, m.embed), input_dims=2),
    ]
    for name, heads in (("q", m.heads), ("k", m.kv), ("v", m.kv)):
        module, per_head = f"{attn}.{name}_proj", (heads, m.head)
        mappings.append(linear(f"{module}.weight", f"attn/{name}", (m.embed, *per_head)))
        if m.linear_bias:
            mappings.append(vector(f"{module}.bias", f"attn/{name}_bias", per_head))
    if m.linear_bias:
        mappings.append(vector(f"{attn}.o_proj.bias", "attn/o_bias"))
    if m.qk_norm:
        mappings += [vector(f"{attn}.{n}_norm.weight", f"attn/{n}_scale") for n in "qk"]
    hidden = m.hidden if experts is None else m.expert_hidden
    up, down = (m.embed, hidden), (hidden, m.embed)
    shapes = {"router": (m.embed, m.moe.experts), "gate": up, "up": up, "down": down}
    modules = experts or {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    for name, module in modules.items():
        mappings.append(linear(f"{layer}.{module}.weight", f"mlp/{name}", shapes[name]))
        if experts is None and m.linear_bias:
            mappings.append(vector(f"{layer}.{module}.bias", f"mlp/{name}_bias"))
    if not m.tied_embeddings:
        mappings.append(embedding("lm_head.weight", "head", m))
    return mappings


_MIXTRAL_EXPERTS = {
    "router": "block_sparse_moe.gate",
    "gate": "block_sparse_moe.experts.{e}.w1",
    "up": "block_sparse_moe.experts.{e}.w3",
    "down": "block_sparse_moe.experts.{e}.w2",
}
_QWEN_EXPERTS = {
    "router": "mlp.gate",
    "gate": "mlp.experts.{e}.gate_proj",
    "up": "mlp.experts.{e}.up_proj",
    "down": "mlp.experts.{e}.down_proj",
}
_LLAMA_LIKE = functools.partial(Family, prefix="model.", ignored=BUFFERS)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_LIKE(
        "LlamaForCausalLM",
        to_model=lambda c: _read_llama(c, biases=True, default_theta=10000.0),
        to_config=_write_llama,
        mappings=_llama_mappings,
    ),
    "mistral": _LLAMA_LIKE(
        "MistralForCausalLM",
        to_model=lambda c: _read_llama(c, windows=_mistral_windows(c)),
        to_config=lambda m: _write_llama(m) | {"sliding_window": m.window},
        mappings=_llama_mappings,
    ),
    "qwen3": _LLAMA_LIKE(
        "Qwen3ForCausalLM",
        to_model=lambda c: _read_llama(c, qk_norm=True, windows=_qwen_windows(c, by_layer=True)),
        to_config=lambda m: _write_llama(m) | _write_qwen_windows(m, by_layer=True),
        mappings=_llama_mappings,
    ),
    "mixtral": _LLAMA_LIKE(
        "MixtralForCausalLM",
        to_model=lambda c: _with_experts(
            c,
            _read_llama(c, windows=_one_window(c, c.get("sliding_window") is not None)),
            experts=c.require("num_local_experts"),
        ),
        to_config=lambda m: (
            _write_llama(m) | {"sliding_window": m.window, "intermediate_size": m.expert_hidden}
        ),
        mappings=lambda m: _llama_mappings(m, _MIXTRAL_EXPERTS),
    ),
    "qwen3_moe": _LLAMA_LIKE(
        "Qwen3MoeForCausalLM",
        to_model=_read_qwen3_moe,
        to_config=lambda m: (
            _write_llama(m, "num_experts")
            | _write_qwen_windows(m, by_layer=False)
            | {"moe_intermediate_size": m.expert_hidden, "norm_topk_prob": m.moe.normalize}
        ),
        mappings=lambda m: _llama_mappings(m, _QWEN_EXPERTS),
    ),
}
