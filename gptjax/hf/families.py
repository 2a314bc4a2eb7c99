"""Hugging Face families: their configurations and tensors, in both directions.

A family is declared once: how its `config.json` reads as a ModelConfig and back, and which of its
tensors holds which parameters (mapping.py). safetensors.py follows the declaration both ways.
Family names appear here and in configs/ only.

Shapes: D embed, H query heads, K key heads, R = H/K, C head_dim, F hidden, E experts.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptjax.config import ModelConfig, MoeConfig, RopeConfig, from_dict, model_problems, to_dict
from gptjax.errors import ConfigError, DataError, MismatchError
from gptjax.hf.mapping import Piece, concatenated_qkv, grouped_qkv, matrix, norm, one, table, vector

Json = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A `model_type`. `ignored` are parts of names of tensors that hold no parameter."""

    architecture: str
    prefix: str
    to_model: Callable[["Reader"], ModelConfig]
    to_config: Callable[[ModelConfig], Json]
    pieces: Callable[[ModelConfig], list[Piece]]
    ignored: tuple[str, ...] = ()

    @property
    def classifier(self) -> str:
        """The architecture with a layer of scores, score.weight, in place of the output layer."""
        for ending in ("LMHeadModel", "ForCausalLM"):
            name = self.architecture.removesuffix(ending)
            if name != self.architecture:
                return f"{name}ForSequenceClassification"
        raise ValueError(self.architecture)


class Reader:
    """Values of a config.json, remembering which were asked for."""

    def __init__(self, values: Json, place: str) -> None:
        self.values, self.place = values, place
        self.read: set[str] = set()
        self.inner: dict[str, Reader] = {}

    def unread(self) -> set[str]:
        """Keys that nobody asked for, those of inner objects with a dot."""
        inner = {f"{name}.{key}" for name, r in self.inner.items() for key in r.unread()}
        return set(self.values) - self.read | inner

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.values.get(name, default)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise DataError(f"{self.place}: has no {name}")
        return value

    def demand(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """The value, which must be one that can be represented here."""
        value = self.get(name, default)
        if value not in allowed:
            raise MismatchError(
                f"{self.place}: {name}={value!r} has no counterpart here (known: "
                f"{', '.join(map(repr, allowed))})"
            )
        return value


def _unless(value: Any, default: Any) -> Any:
    """None where a field has its default, so that equal models are equal."""
    return None if value == default else value


def _rope_of(c: Reader, theta: float | None = None) -> RopeConfig:
    """Rotary settings, from `rope_parameters` or the older `rope_theta` and `rope_scaling`.

    `theta` is what an absent base stands for.
    """
    older = c.get("rope_scaling", {})
    given = c.get("rope_parameters", older)
    settings = c.inner["rope_parameters"] = Reader(given, f"{c.place}: rope_parameters")
    kind = settings.get("rope_type", settings.get("type", "default"))
    names = {"default": "none", "linear": "linear", "llama3": "low_frequency", "yarn": "yarn"}
    if kind not in names:
        raise MismatchError(
            f"{settings.place}: rope_type={kind!r} has no counterpart here (known: "
            f"{', '.join(names)})"
        )
    for reader in (c, settings):  # these architectures turn whole heads
        reader.demand("partial_rotary_factor", 1, default=1)
    base = settings.get("rope_theta", c.get("rope_theta", theta))
    rope = RopeConfig(
        theta=float(c.need("rope_theta") if base is None else base),
        scaling=names[kind],  # type: ignore[arg-type]
    )
    if kind == "default":
        return rope
    rope = replace(rope, factor=float(settings.need("factor")))
    if kind == "linear":
        return rope
    original = settings.get("original_max_position_embeddings")
    original = c.need("max_position_embeddings") if original is None else original
    rope = replace(rope, original_context=int(original))
    if kind == "llama3":
        return replace(
            rope,
            low_freq_factor=float(settings.need("low_freq_factor")),
            high_freq_factor=float(settings.need("high_freq_factor")),
        )
    for name in ("mscale", "mscale_all_dim"):
        settings.demand(name, None)
    settings.demand("truncate", True, default=True)
    factor = settings.get("attention_factor")
    return replace(
        rope,
        beta_fast=float(settings.get("beta_fast", 32.0)),
        beta_slow=float(settings.get("beta_slow", 1.0)),
        attention_factor=None if factor is None else float(factor),
    )


def _rope_to(rope: RopeConfig) -> Json:
    """Keys of config.json, as `transformers` 5 writes them and as its older versions do."""
    values = _rope_parameters(rope)
    old = {k: v for k, v in values.items() if k != "rope_theta"}
    return {
        "rope_parameters": values,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "none" else old,
    }


def _rope_parameters(rope: RopeConfig) -> Json:
    names = {"none": "default", "linear": "linear", "low_frequency": "llama3", "yarn": "yarn"}
    values: Json = {"rope_type": names[rope.scaling], "rope_theta": rope.theta}
    if rope.scaling != "none":
        values["factor"] = rope.factor
    if rope.scaling in ("low_frequency", "yarn"):
        values["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "low_frequency":
        values |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.scaling == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            values["attention_factor"] = rope.attention_factor
    return values


def _gpt(c: Reader, *, activation: str, post: bool) -> ModelConfig:
    embed = c.need("n_embd")
    # What post-norm models of this kind call gelu is the tanh approximation as well.
    names = ("gelu_new", "gelu") if post else ("gelu_new", "gelu_pytorch_tanh")
    c.demand(activation, *names, default=names[post])
    if not post:
        c.demand("scale_attn_weights", True, default=True)
        c.demand("scale_attn_by_inverse_layer_idx", False, default=False)
        c.demand("add_cross_attention", False, default=False)
    return ModelConfig(
        vocab_size=c.need("vocab_size"),
        context=c.need("n_positions"),
        layers=c.need("n_layer"),
        embed=embed,
        heads=c.need("n_head"),
        mlp=None if post else _unless(c.get("n_inner", 4 * embed), 4 * embed),
        norm_eps=float(c.get("layer_norm_epsilon", 1e-5)),
        norm_position="post" if post else "pre",
        tied_embeddings=bool(c.get("tie_word_embeddings", True)),
    )


def _gpt_config(m: ModelConfig, activation: Json) -> Json:
    return activation | {
        "vocab_size": m.vocab_size,
        "n_positions": m.context,
        "n_layer": m.layers,
        "n_embd": m.embed,
        "n_head": m.heads,
        "layer_norm_epsilon": m.norm_eps,
        "tie_word_embeddings": m.tied_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), m.dropout),
    }


def _gpt_pieces(m: ModelConfig, *, embed: str, positions: str, final: str | None) -> list[Piece]:
    conv = functools.partial(matrix, conv1d=True)
    h = "transformer.h.{i}"
    pieces = [
        table(f"transformer.{embed}.weight", "embed", m),
        one(f"transformer.{positions}.weight", "positions", lambda t: t, lambda x: x),
        *norm(f"{h}.ln_1", "norm_attn", m),
        *norm(f"{h}.ln_2", "norm_mlp", m),
        concatenated_qkv(f"{h}.attn.c_attn.weight", m),
        concatenated_qkv(f"{h}.attn.c_attn.bias", m, "_bias"),
        conv(f"{h}.attn.c_proj.weight", "attn/o", (m.heads, m.head, m.embed), inputs=2),
        vector(f"{h}.attn.c_proj.bias", "attn/o_bias"),
        conv(f"{h}.mlp.c_fc.weight", "mlp/up", (m.embed, m.hidden)),
        vector(f"{h}.mlp.c_fc.bias", "mlp/up_bias"),
        conv(f"{h}.mlp.c_proj.weight", "mlp/down", (m.hidden, m.embed)),
        vector(f"{h}.mlp.c_proj.bias", "mlp/down_bias"),
    ]
    if final:
        pieces += norm(f"transformer.{final}", "norm_final", m)
    if not m.tied_embeddings:
        pieces.append(table("lm_head.weight", "head", m))
    return pieces


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
        kv_heads=_unless(c.get("num_key_value_heads", heads), heads),
        head_dim=_unless(c.get("head_dim", embed // heads), embed // heads),
        mlp=_unless(c.need("intermediate_size"), 4 * embed),
        activation="swiglu",
        norm="rmsnorm",
        norm_eps=float(c.need("rms_norm_eps")),
        qk_norm=qk_norm,
        positions="rope",
        rope=_rope_of(c, theta),
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
        hidden=_unless(c.need("moe_intermediate_size"), model.hidden),
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
        **_rope_to(m.rope),
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


def _llama_pieces(m: ModelConfig, experts: Mapping[str, str] | None = None) -> list[Piece]:
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


def _falcon(c: Reader) -> ModelConfig:
    embed, heads = c.need("hidden_size"), c.need("num_attention_heads")
    grouped, alibi = bool(c.get("new_decoder_architecture", False)), bool(c.get("alibi", False))
    parallel = grouped or bool(c.get("parallel_attn", True))
    kv = heads
    if grouped:
        kv = c.get("num_kv_heads", heads)
    elif c.get("multi_query", True):
        kv = 1
    norms = c.get("num_ln_in_parallel_attn") or (2 if grouped else 1)
    c.demand("apply_residual_connection_post_layernorm", False, default=False)
    return ModelConfig(
        vocab_size=c.need("vocab_size"),
        context=c.get("max_position_embeddings", 2048),
        layers=c.need("num_hidden_layers"),
        embed=embed,
        heads=heads,
        kv_heads=_unless(kv, heads),
        mlp=_unless(c.get("ffn_hidden_size", 4 * embed), 4 * embed),
        activation={"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}[
            c.demand("activation", "gelu", "gelu_pytorch_tanh", default="gelu")
        ],  # type: ignore[arg-type]
        norm_eps=float(c.get("layer_norm_epsilon", 1e-5)),
        residual="parallel" if parallel else "sequential",
        shared_norm=parallel and norms == 1,
        positions="alibi" if alibi else "rope",
        rope=RopeConfig() if alibi else _rope_of(c, 10000.0),
        alibi="scaled_bf16" if alibi else "exact",
        linear_bias=bool(c.get("bias", False)),
        tied_embeddings=bool(c.get("tie_word_embeddings", True)),
    )


def _falcon_config(m: ModelConfig) -> Json:
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
        "activation": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}.get(m.activation, "?"),
        "alibi": m.positions == "alibi",
        "bias": m.linear_bias,
        "layer_norm_epsilon": m.norm_eps,
        **_rope_to(m.rope),
        "tie_word_embeddings": m.tied_embeddings,
        "hidden_dropout": m.dropout,
        "attention_dropout": m.dropout,
    }


def _falcon_pieces(m: ModelConfig) -> list[Piece]:
    h = "transformer.h.{i}"
    norm_attn, norm_mlp = "input_layernorm", "post_attention_layernorm"
    if m.residual == "parallel" and not m.shared_norm:
        norm_attn, norm_mlp = "ln_attn", "ln_mlp"
    attn, mlp = f"{h}.self_attention", f"{h}.mlp"
    pieces = [
        table("transformer.word_embeddings.weight", "embed", m),
        *norm("transformer.ln_f", "norm_final", m),
        *norm(f"{h}.{norm_attn}", "norm_attn", m),
        *([] if m.shared_norm else norm(f"{h}.{norm_mlp}", "norm_mlp", m)),
        grouped_qkv(f"{attn}.query_key_value.weight", m),
        matrix(f"{attn}.dense.weight", "attn/o", (m.heads, m.head, m.embed), inputs=2),
        matrix(f"{mlp}.dense_h_to_4h.weight", "mlp/up", (m.embed, m.hidden)),
        matrix(f"{mlp}.dense_4h_to_h.weight", "mlp/down", (m.hidden, m.embed)),
    ]
    if m.linear_bias:
        pieces += [
            grouped_qkv(f"{attn}.query_key_value.bias", m, "_bias"),
            vector(f"{attn}.dense.bias", "attn/o_bias"),
            vector(f"{mlp}.dense_h_to_4h.bias", "mlp/up_bias"),
            vector(f"{mlp}.dense_4h_to_h.bias", "mlp/down_bias"),
        ]
    if not m.tied_embeddings:
        pieces.append(table("lm_head.weight", "head", m))
    return pieces


_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
_MIXTRAL = "block_sparse_moe"
_LLAMA_LIKE = functools.partial(Family, prefix="model.", ignored=_BUFFERS)

FAMILIES: dict[str, Family] = {
    "openai-gpt": Family(
        "OpenAIGPTLMHeadModel",
        "transformer.",
        lambda c: _gpt(c, activation="afn", post=True),
        lambda m: _gpt_config(m, {"afn": "gelu"}),
        lambda m: _gpt_pieces(m, embed="tokens_embed", positions="positions_embed", final=None),
        _BUFFERS,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.",
        lambda c: _gpt(c, activation="activation_function", post=False),
        lambda m: _gpt_config(m, {"activation_function": "gelu_new", "n_inner": m.mlp}),
        lambda m: _gpt_pieces(m, embed="wte", positions="wpe", final="ln_f"),
        _BUFFERS,
    ),
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
    "falcon": Family(
        "FalconForCausalLM", "transformer.", _falcon, _falcon_config, _falcon_pieces, _BUFFERS
    ),
}


def read_config(config: Json, place: str) -> tuple[Family, ModelConfig, set[str]]:
    """The family and the model of a config.json, and the keys that were not read.

    Raises DataError for one that makes no sense, MismatchError for a model with no counterpart.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise MismatchError(
            f"{place}: model_type={kind!r} is not known (known: {', '.join(FAMILIES)})"
        )
    reader = Reader(config, place)
    try:
        model = FAMILIES[kind].to_model(reader)
        from_dict(to_dict(model), ModelConfig, "model.")  # which looks at the types
        problems = list(model_problems(model))
        if problems:
            raise ConfigError(problems)
    except (TypeError, ValueError, ZeroDivisionError, ConfigError) as error:
        raise DataError(f"{place}: has a value that makes no sense ({error})") from None
    return FAMILIES[kind], model, reader.unread()


def family_of(model: ModelConfig) -> tuple[str, Json]:
    """The `model_type` that has this very model, and its config.json.

    Raises MismatchError, with what the nearest family lacks, where there is none.
    """
    neutral = lambda m: replace(
        m,
        dropout=0.0,
        init_std=0.0,
        vocab_multiple=1,
        kv_heads=m.kv,
        head_dim=m.head,
        mlp=m.expert_hidden if m.moe.experts else m.hidden,
        moe=replace(
            m.moe, capacity=0.0, balance_loss=0.0, router_z_loss=0.0, hidden=m.expert_hidden
        ),
        rope=m.rope if m.positions == "rope" else RopeConfig(),
        pattern=m.pattern[:1] if len(set(m.pattern)) == 1 else m.pattern,
        window=m.window if "window" in m.pattern else None,
        norm_bias=m.norm_bias or m.norm == "rmsnorm",
    )
    differences: dict[str, list[str]] = {}
    refused = set()
    for name, family in FAMILIES.items():
        config = {"model_type": name, "architectures": [family.architecture]}
        config |= family.to_config(model)
        try:
            back = family.to_model(Reader(json.loads(json.dumps(config)), name))
        except (MismatchError, DataError) as error:
            differences[name] = [str(error)]
            refused.add(name)
            continue
        if not model.moe.experts:
            back = replace(back, moe=model.moe)
        ours, theirs = vars(neutral(model)), vars(neutral(back))
        differs = [f"{k}: {ours[k]!r}, {theirs[k]!r} there" for k in ours if ours[k] != theirs[k]]
        if not differs:
            return name, config
        differences[name] = differs
    nearest = min(differences, key=lambda name: (name in refused, len(differences[name])))
    raise MismatchError(
        f"no Hugging Face architecture has this model; the nearest, {nearest}, differs in",
        differences[nearest],
    )
