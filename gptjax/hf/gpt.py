"""GPT-1 and GPT-2: configuration and tensors of their Hugging Face checkpoints.

Shapes: D embed, H query heads, K key heads, R = H/K, C head_dim, F hidden, E experts.
"""

import functools

from gptjax.config import ModelConfig
from gptjax.hf.mapping import TensorMapping, concatenated_qkv, matrix, norm, one, table, vector
from gptjax.hf.reader import BUFFERS, Family, Json, Reader, unless_default


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
        mlp=None if post else unless_default(c.get("n_inner", 4 * embed), 4 * embed),
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


def _gpt_pieces(
    m: ModelConfig, *, embed: str, positions: str, final: str | None
) -> list[TensorMapping]:
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


FAMILIES: dict[str, Family] = {
    "openai-gpt": Family(
        "OpenAIGPTLMHeadModel",
        "transformer.",
        lambda c: _gpt(c, activation="afn", post=True),
        lambda m: _gpt_config(m, {"afn": "gelu"}),
        lambda m: _gpt_pieces(m, embed="tokens_embed", positions="positions_embed", final=None),
        BUFFERS,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.",
        lambda c: _gpt(c, activation="activation_function", post=False),
        lambda m: _gpt_config(m, {"activation_function": "gelu_new", "n_inner": m.mlp}),
        lambda m: _gpt_pieces(m, embed="wte", positions="wpe", final="ln_f"),
        BUFFERS,
    ),
}
