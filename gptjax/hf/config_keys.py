"""Keys of config.json that a model does not depend on; any other that is not read is refused."""

from collections.abc import Collection

from gptjax.errors import MismatchError
from gptjax.hf.reader import Json

# What no logits depend on, or what only some of the supported families use. Generation settings are
# not read from config.json: `gptjax sample` has its own.
_WITHOUT_EFFECT = """
architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id
pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
tokenizer_class prefix _name_or_path _commit_hash name_or_path auto_map custom_pipelines
initializer_range init_std pretraining_tp attention_dropout hidden_dropout attn_pdrop embd_pdrop
resid_pdrop output_router_logits router_jitter_noise task_specific_params n_ctx n_special
predict_special_tokens summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj reorder_and_upcast_attn use_sliding_window sliding_window max_window_layers
multi_query num_kv_heads num_ln_in_parallel_attn parallel_attn rope_theta rope_scaling
rope_parameters original_max_position_embeddings num_labels id2label label2id problem_type
finetuning_task return_dict output_attentions output_hidden_states torchscript
chunk_size_feed_forward gradient_checkpointing attn_implementation _attn_implementation
_attn_implementation_autoset _attn_implementation_internal _experts_implementation_internal
experts_implementation _flash_attn_2_enabled tf_legacy_loss is_decoder is_llama_config
transformers.js_config unsloth_version unsloth_fixed max_length min_length do_sample early_stopping
num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
_WITHOUT_EFFECT_AS = {  # and what only one value of is without effect
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "rope_interleaved": False,
    "use_bfloat16": False,
    "pruned_heads": {},
}


def check_unused(config: Json, unused: Collection[str], location: str) -> None:
    """Raises MismatchError for keys that were not read although the logits may depend on them.

    A nested key is named with a dot. A key whose value is null is no setting, and one that begins
    with an underscore is a library's own note.
    """
    without_effect, unknown = set(_WITHOUT_EFFECT.split()), []
    for name in sorted(unused):
        outer, _, inner = name.partition(".")
        value = config.get(name, config[outer].get(inner) if outer in config and inner else None)
        if value is None or name in without_effect or name.startswith("_"):  # notes of libraries
            continue
        if name in _WITHOUT_EFFECT_AS and value == _WITHOUT_EFFECT_AS[name]:
            continue
        unknown.append(f"{name}={value!r}")
    if unknown:
        raise MismatchError(
            f"{location}: has settings that gptjax does not know; remove those that the model does "
            "not depend on",
            unknown,
        )
