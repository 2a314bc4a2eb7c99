"""Falcon: configuration and tensors of its Hugging Face checkpoints.

Shapes: D embed, H query heads, K key heads, R = H/K, C head_dim, F hidden, E experts.
"""

from gptjax.config import ModelConfig, RopeConfig
from gptjax.hf.mapping import TensorMapping, grouped_qkv, matrix, norm, table, vector
from gptjax.hf.reader import BUFFERS, Family, Json, Reader, unless_default
from gptjax.hf.rope import read_rope, write_rope


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
        kv_heads=unless_default(kv, heads),
        mlp=unless_default(c.get("ffn_hidden_size", 4 * embed), 4 * embed),
        activation={"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}[
            c.demand("activation", "gelu", "gelu_pytorch_tanh", default="gelu")
        ],  # type: ignore[arg-type]
        norm_eps=float(c.get("layer_norm_epsilon", 1e-5)),
        residual="parallel" if parallel else "sequential",
        shared_norm=parallel and norms == 1,
        positions="alibi" if alibi else "rope",
        rope=RopeConfig() if alibi else read_rope(c, 10000.0),
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
        **write_rope(m.rope),
        "tie_word_embeddings": m.tied_embeddings,
        "hidden_dropout": m.dropout,
        "attention_dropout": m.dropout,
    }


def _falcon_pieces(m: ModelConfig) -> list[TensorMapping]:
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


FAMILIES: dict[str, Family] = {
    "falcon": Family(
        "FalconForCausalLM", "transformer.", _falcon, _falcon_config, _falcon_pieces, BUFFERS
    ),
}
