"""Verification of a converted model: its outputs against `transformers` on the same weights.

Shapes: B batch of equal sequences, S sequences, T tokens, N = B*T, P compared positions, D embed,
K scores, V vocabulary.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ComputeConfig
from gptjax.hf import safetensors
from gptjax.hf.reader import Json
from gptjax.hf.safetensors import Source
from gptjax.model import decoder, heads
from gptjax.model.decoder import Params
from gptjax.parallel import arrays, sharding
from gptjax.runtime.progress import Progress

SCORE_TENSOR = "score.weight"
"""The output layer [K, D] of a model for sequence classification."""
_TOKENS = 1024  # of a compared sequence, at most
_POSITIONS = 64  # whose logits are compared, in each sequence


def compare_with_transformers(source: Source, params: Params, progress: Progress) -> Json | str:
    """Compares logits, or a classifier's scores, as `compare_logits` and `compare_scores` do.

    Returns why they were not compared where `transformers` or torch is not installed, or cannot
    load the folder.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not compared: {' and '.join(missing)} not installed"
    progress.say("comparing with transformers")
    try:
        if SCORE_TENSOR in source.names:
            return compare_scores(source)
        return compare_logits(source, params)
    except (ImportError, OSError, ValueError, RuntimeError, MemoryError) as error:
        return f"not compared: {type(error).__name__}: {str(error).splitlines()[0][:200]}"


def compare_logits(source: Source, params: Params) -> Json:
    """Differences of the logits from those of `transformers` on the folder's weights, in float32.

    Two sequences of random tokens are compared, of up to 1024 tokens: "near" at positions 0, 1, 2,
    ..., and "far", spread over the whole context, where a mistake in the rotary frequencies shows.
    With ALiBi, for which `transformers` counts positions itself, there is one, of up to 4096. The
    result has the largest difference at 64 positions of each, the share of them where the likeliest
    token agrees, and the Kullback-Leibler divergence in nats per token, each the worst of the two.
    """
    import transformers

    theirs = _load(source, transformers.AutoModelForCausalLM)
    model = source.model
    alibi = model.positions == "alibi"
    length = min(model.context, 4 * _TOKENS if alibi else _TOKENS)
    ids_T = np.random.default_rng(0).integers(0, model.vocab_size, length).astype(np.int32)
    compared_P = np.unique(np.linspace(0, length - 1, _POSITIONS).round().astype(int))
    positions = {"near": np.arange(length)}
    if model.context > length and not alibi:
        positions["far"] = np.linspace(0, model.context - 1, length).round().astype(int)
    ours = _logits_fn(source, compared_P, length)
    batch = sharding.axis_size("batch")
    place = lambda a_T: arrays.global_batch(np.repeat(a_T[None], batch, 0).astype(np.int32), batch)
    result: Json = {
        "version": transformers.__version__,
        "tokens": length,
        "largest_logit": 0.0,
        "largest_difference": 0.0,
        "argmax_agreement": 1.0,
        "kl_nats_per_token": 0.0,
    }
    for name, positions_T in positions.items():
        want_PV = _transformers_logits(
            theirs, ids_T, compared_P, None if name == "near" else positions_T
        )
        got_PV = np.asarray(ours(params, place(ids_T), place(positions_T)))
        agreement, divergence = _agreement(want_PV, got_PV)
        result["largest_logit"] = max(result["largest_logit"], float(np.abs(want_PV).max()))
        result["argmax_agreement"] = min(result["argmax_agreement"], agreement)
        difference = float(np.abs(want_PV - got_PV).max())
        result["largest_difference"] = max(result["largest_difference"], difference)
        result["kl_nats_per_token"] = max(result["kl_nats_per_token"], divergence)
        result["last_position"] = int(positions_T[-1])
    return result


def _load(source: Source, auto_class: Any) -> Any:
    """The folder's model in `transformers`, float32, made by one of its Auto classes."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = auto_class.from_pretrained(
        source.folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return model.eval()


def _logits_fn(
    source: Source, compared_P: np.ndarray, length: int
) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """Our logits [P, V] at the compared positions of the first sequence of a batch."""
    model = source.model

    @jax.jit
    def logits(params: Params, ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        x_ND = decoder.apply(params, model, ComputeConfig(), ids_BT, positions_BT=positions_BT).x_ND
        replicated = sharding.spec(None, None)
        x_TD = jax.sharding.reshard(x_ND, replicated)[:length]
        x_PD = x_TD.at[jnp.asarray(compared_P)].get(out_sharding=replicated)
        return decoder.logits(params, model, x_PD)[:, : model.vocab_size]

    return logits


def _transformers_logits(
    theirs: Any, ids_T: np.ndarray, compared_P: np.ndarray, positions_T: np.ndarray | None
) -> np.ndarray:
    """The logits [P, V] of `transformers`; it counts the positions unless they are given."""
    import torch

    kwargs = {} if positions_T is None else {"position_ids": torch.tensor(positions_T)[None]}
    with torch.no_grad():
        ids_1T = torch.tensor(ids_T[None], dtype=torch.long)
        mask_1T = torch.ones_like(ids_1T)
        hidden_1TD = theirs.base_model(ids_1T, attention_mask=mask_1T, **kwargs)[0]
        return theirs.get_output_embeddings()(hidden_1TD[0, compared_P]).numpy()


def _agreement(want_PV: np.ndarray, got_PV: np.ndarray) -> tuple[float, float]:
    """The share of positions where the likeliest token agrees, and the mean KL divergence, nats."""
    from scipy.special import log_softmax

    p_PV, q_PV = (log_softmax(np.float64(x), -1) for x in (want_PV, got_PV))
    divergence = float((np.exp(p_PV) * (p_PV - q_PV)).sum(-1).mean())
    return float((want_PV.argmax(-1) == got_PV.argmax(-1)).mean()), divergence


def compare_scores(source: Source) -> Json:
    """Differences of a classifier's scores from those of `transformers` on the folder's weights, in
    float32, for padded sequences of random tokens of several lengths.
    """
    import torch
    import transformers

    theirs = _load(source, transformers.AutoModelForSequenceClassification)
    model, pad_id = source.model, source.config["pad_token_id"]
    count, length = 4 * sharding.axis_size("batch"), min(model.context, 64)
    rng = np.random.default_rng(0)
    ids_ST = rng.integers(0, model.vocab_size, (count, length)).astype(np.int32)
    lengths_S = rng.integers(2, length + 1, count).astype(np.int32)
    mask_ST = np.arange(length) < lengths_S[:, None]
    ids_ST = np.where(mask_ST, np.where(ids_ST == pad_id, pad_id - 1, ids_ST), pad_id)
    (extract,) = {one["extract"] for one in source.config["task_specific_params"].values()}
    ids_ST[np.arange(count), lengths_S - 1] = extract

    @jax.jit
    def ours(params: Params, ids_ST: jax.Array, lengths_S: jax.Array) -> jax.Array:
        x_ND = decoder.apply(params, model, ComputeConfig(), ids_ST).x_ND
        scores_SK = heads.scores(params, heads.last(x_ND, lengths_S), count)
        return jax.sharding.reshard(scores_SK, jax.P(None, None))

    score_DK = jnp.asarray(np.float32(source.tensor(SCORE_TENSOR)).T)
    params = safetensors.read_params(source) | {heads.NAME: {"score": score_DK}}
    got_SK = np.asarray(ours(params, *arrays.global_batch((ids_ST, lengths_S), count)))
    with torch.no_grad():
        attention_mask = torch.tensor(mask_ST, dtype=torch.long)
        ids = torch.tensor(ids_ST, dtype=torch.long)
        want_SK = theirs(ids, attention_mask=attention_mask).logits.numpy()
    return {
        "version": transformers.__version__,
        "architecture": type(theirs).__name__,
        "rows": count,
        "largest_score": float(np.abs(want_SK).max()),
        "largest_difference": float(np.abs(want_SK - got_SK).max()),
    }
