"""Comparison of a converted model with `transformers` on the same weights."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ComputeConfig
from gptjax.hf import safetensors
from gptjax.hf.safetensors import Source
from gptjax.model import decoder, heads
from gptjax.model.decoder import Params
from gptjax.parallel import arrays, sharding
from gptjax.runtime.progress import Progress

_COMPARED_TOKENS = 1024


_COMPARED_POSITIONS = 64


Json = dict[str, Any]


SCORE_TENSOR = "score.weight"


def compare_with_transformers(source: Source, params: Params, progress: Progress) -> Json | str:
    """Logits against those of `transformers`, where it is installed and loads the folder."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not compared: {' and '.join(missing)} not installed"
    progress.say("comparing with transformers")
    try:
        return compare_scores(source) if SCORE_TENSOR in source.names else compare_logits(source, params)
    except (ImportError, OSError, ValueError, RuntimeError, MemoryError) as error:
        return f"not compared: {type(error).__name__}: {str(error).splitlines()[0][:200]}"


def compare_logits(source: Source, params: Params) -> Json:
    """How far the logits are from those of `transformers` on the folder's weights, in float32.

    Two sequences of random tokens, as long as the context up to 1024: one at positions 0, 1, 2, …,
    one spread over the whole context (not with ALiBi, whose place `transformers` takes from the
    sequence: there one sequence of up to 4096 tokens). Logits of 64 tokens of each are compared:
    the largest difference, how often the likeliest token agrees, and the Kullback-Leibler
    divergence (summed over the vocabulary, in nats, a token).
    """
    import torch
    import transformers
    from scipy.special import log_softmax

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    model = source.model
    alibi = model.positions == "alibi"
    length = min(model.context, 4 * _COMPARED_TOKENS if alibi else _COMPARED_TOKENS)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, length)).astype(np.int32)
    chosen = np.unique(np.linspace(0, length - 1, _COMPARED_POSITIONS).round().astype(int))
    starts = {"near": np.arange(length)}
    if model.context > length and not alibi:
        starts["far"] = np.linspace(0, model.context - 1, length).round().astype(int)

    @jax.jit
    def ours(params: Params, ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        x_ND = decoder.apply(params, model, ComputeConfig(), ids_BT, positions_BT=positions_BT).x_ND
        rows = sharding.spec(None, None)
        x_ND = jax.sharding.reshard(x_ND, rows)[:length]
        picked = x_ND.at[jnp.asarray(chosen)].get(out_sharding=rows)
        return decoder.logits(params, model, picked)[:, : model.vocab_size]

    result: Json = {
        "version": transformers.__version__,
        "tokens": length,
        "largest_logit": 0.0,
        "largest_difference": 0.0,
        "argmax_agreement": 1.0,
        "kl_nats_per_token": 0.0,
    }
    rows = sharding.axis_size("batch")
    place = lambda row: arrays.global_batch(np.repeat(row[None], rows, 0).astype(np.int32), rows)
    for name, positions in starts.items():
        kwargs = {} if name == "near" else {"position_ids": torch.tensor(positions)[None]}
        with torch.no_grad():
            given = torch.tensor(ids, dtype=torch.long)
            hidden = theirs.base_model(given, attention_mask=torch.ones_like(given), **kwargs)[0]
            want = theirs.get_output_embeddings()(hidden[0, chosen]).numpy()
        got = np.asarray(ours(params, place(ids[0]), place(positions)))
        p, q = (log_softmax(np.float64(x), -1) for x in (want, got))
        divergence = float((np.exp(p) * (p - q)).sum(-1).mean())
        agreement = float((want.argmax(-1) == got.argmax(-1)).mean())
        result["largest_logit"] = max(result["largest_logit"], float(np.abs(want).max()))
        result["argmax_agreement"] = min(result["argmax_agreement"], agreement)
        difference = float(np.abs(want - got).max())
        result["largest_difference"] = max(result["largest_difference"], difference)
        result["kl_nats_per_token"] = max(result["kl_nats_per_token"], divergence)
        result["last_position"] = int(positions[-1])
    return result


def compare_scores(source: Source) -> Json:
    """How far a classifier's scores are from those of `transformers` on the folder's weights, in
    float32: of rows of random tokens, of several lengths and filled up with padding.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        source.folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    model, fill = source.model, source.config["pad_token_id"]
    rows, length = 4 * sharding.axis_size("batch"), min(model.context, 64)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.vocab_size, (rows, length)).astype(np.int32)
    lengths = rng.integers(2, length + 1, rows).astype(np.int32)
    given = np.arange(length) < lengths[:, None]
    ids = np.where(given, np.where(ids == fill, fill - 1, ids), fill)
    (extract,) = {one["extract"] for one in source.config["task_specific_params"].values()}
    ids[np.arange(rows), lengths - 1] = extract

    @jax.jit
    def ours(params: Params, ids_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        x_ND = decoder.apply(params, model, ComputeConfig(), ids_BT).x_ND
        y_BK = heads.scores(params, heads.last(x_ND, lengths_B), rows)
        return jax.sharding.reshard(y_BK, jax.P(None, None))

    score_DO = jnp.asarray(np.float32(source.tensor(SCORE_TENSOR)).T)
    params = safetensors.read_params(source) | {heads.NAME: {"score": score_DO}}
    got = np.asarray(ours(params, *arrays.global_batch((ids, lengths), rows)))
    with torch.no_grad():
        mask = torch.tensor(given, dtype=torch.long)
        want = theirs(torch.tensor(ids, dtype=torch.long), attention_mask=mask).logits.numpy()
    return {
        "version": transformers.__version__,
        "architecture": type(theirs).__name__,
        "rows": rows,
        "largest_score": float(np.abs(want).max()),
        "largest_difference": float(np.abs(want - got).max()),
    }
