"""RoPE settings (Su et al. 2021) of `config.json`, context scaling included: read and written."""

from dataclasses import replace
from typing import Any

from gptjax.config import RopeConfig
from gptjax.errors import MismatchError
from gptjax.hf.reader import ConfigReader, Json

# Our RopeConfig.scaling by the `rope_type` of `transformers`.
_SCALING: dict[str, Any] = {
    "default": "none",
    "linear": "linear",
    "llama3": "low_frequency",
    "yarn": "yarn",
}
_ROPE_TYPE = {scaling: rope_type for rope_type, scaling in _SCALING.items()}


def read_rope(c: ConfigReader, default_theta: float | None = None) -> RopeConfig:
    """RoPE settings of `rope_scaling`, or else of `rope_parameters`, which came after it.

    Where both are there, `transformers` 5 reads `rope_scaling`; it prefers a frequency within them
    to `rope_theta`, and `original_max_position_embeddings` beside them to one within.
    `default_theta` is the base frequency where config.json gives none; with None it must. Raises
    MismatchError for a scaling that is not supported, DataError for a setting that is missing.
    """
    c.object_of("rope_parameters")
    key = "rope_scaling" if c.object_of("rope_scaling") else "rope_parameters"
    location = f"{c.location}: {key}"
    settings = ConfigReader(c.object_of(key), location)
    c.nested[key] = settings
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in _SCALING:
        raise MismatchError(
            f"{location}: rope_type={kind!r}: not supported; supported: {', '.join(_SCALING)}"
        )
    for reader in (c, settings):  # the decoder rotates whole heads in these architectures
        reader.one_of("partial_rotary_factor", 1, default=1)
    theta = settings.get("rope_theta", c.get("rope_theta", default_theta))
    rope = RopeConfig(
        theta=float(c.require("rope_theta") if theta is None else theta), scaling=_SCALING[kind]
    )
    if kind == "default":
        return rope
    rope = replace(rope, factor=float(settings.require("factor")))
    if kind == "linear":
        return rope
    within = settings.get("original_max_position_embeddings")
    original = c.get("original_max_position_embeddings", within)
    original = c.require("max_position_embeddings") if original is None else original
    rope = replace(rope, original_context=int(original))
    if kind == "llama3":
        return replace(
            rope,
            low_freq_factor=float(settings.require("low_freq_factor")),
            high_freq_factor=float(settings.require("high_freq_factor")),
        )
    for name in ("mscale", "mscale_all_dim"):
        settings.one_of(name, None)
    settings.one_of("truncate", True, default=True)
    factor = settings.get("attention_factor")
    return replace(
        rope,
        beta_fast=float(settings.get("beta_fast", 32.0)),
        beta_slow=float(settings.get("beta_slow", 1.0)),
        attention_factor=None if factor is None else float(factor),
    )


def write_rope(rope: RopeConfig) -> Json:
    """RoPE's keys of config.json, as `transformers` 5 writes them and as older versions do."""
    values = _rope_parameters(rope)
    older = {k: v for k, v in values.items() if k != "rope_theta"}
    return {
        "rope_parameters": values,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "none" else older,
    }


def _rope_parameters(rope: RopeConfig) -> Json:
    """The value of `rope_parameters`, as `transformers` 5 writes it."""
    values: Json = {"rope_type": _ROPE_TYPE[rope.scaling], "rope_theta": rope.theta}
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
