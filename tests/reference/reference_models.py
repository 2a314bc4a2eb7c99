"""Small models of `transformers` with random weights: every family and structural variant."""

from pathlib import Path
from typing import Any

_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 99}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 99,
}
_GROUPED = _LLAMA | {"num_key_value_heads": 2}
_MOE = _GROUPED | {"num_experts_per_tok": 2}
_FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 99,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt1": ("OpenAIGPT", _GPT),
    "gpt2": ("GPT2", _GPT),
    "gpt2-untied": ("GPT2", _GPT | {"tie_word_embeddings": False, "n_inner": 80}),
    "llama1": ("Llama", _LLAMA),
    "llama2-grouped": ("Llama", _GROUPED | {"rms_norm_eps": 1e-5}),
    "llama3": (
        "Llama",
        _GROUPED
        | {"max_position_embeddings": 2048}
        | _rope(
            "llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama32-tied": ("Llama", _GROUPED | {"tie_word_embeddings": True}),
    "llama-wide-heads": ("Llama", _GROUPED | {"head_dim": 16}),
    "llama-biases": ("Llama", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "Llama",
        _GROUPED | {"max_position_embeddings": 256} | _rope("linear", factor=4.0),
    ),
    "llama-yarn": (
        "Llama",
        _GROUPED
        | {"max_position_embeddings": 1536, "head_dim": 32}
        | _rope("yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "mistral-window": ("Mistral", _GROUPED | {"sliding_window": 7}),
    "qwen3-qk-norm": ("Qwen3", _GROUPED | {"head_dim": 16}),
    "falcon-7b": ("Falcon", _FALCON),
    "falcon-40b": (
        "Falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon2-11b": (
        "Falcon",
        _FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": (
        "Falcon",
        _FALCON
        | {"hidden_size": 48, "num_attention_heads": 6, "max_position_embeddings": 2048}
        | {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
    ),
    "falcon-untied": ("Falcon", _FALCON | {"tie_word_embeddings": False}),
    "falcon3": ("Llama", _GROUPED | {"head_dim": 32} | _rope("default", rope_theta=1000042.0)),
    "mixtral": ("Mixtral", _MOE | {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3Moe",
        _MOE
        | {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen3-moe-unnormalized": (
        "Qwen3Moe",
        _MOE
        | {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": False},
    ),
}


def build(name: str, folder: Path) -> Any:
    """The model of a variant, with weights large enough to affect the logits; saved in a folder."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    kind, fields = VARIANTS[name]
    head = "LMHeadModel" if "GPT" in kind else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**fields))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            mean = float(parameter.ndim == 1 and path.endswith("weight"))  # a norm's scale
            parameter.normal_(mean, 0.2)
    model.eval().save_pretrained(folder)
    return model
