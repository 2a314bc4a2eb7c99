"""Rotary position settings of a `config.json`, in both directions."""

from dataclasses import replace

from gptjax.config import RopeConfig
from gptjax.errors import MismatchError
from gptjax.hf.reader import Json, Reader


def read_rope(c: Reader, theta: float | None = None) -> RopeConfig:
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


def write_rope(rope: RopeConfig) -> Json:
    """Keys of config.json, as `transformers` 5 writes them and as its older versions do."""
    values = write_rope_parameters(rope)
    old = {k: v for k, v in values.items() if k != "rope_theta"}
    return {
        "rope_parameters": values,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "none" else old,
    }


def write_rope_parameters(rope: RopeConfig) -> Json:
    """The `rope_parameters` of a `config.json`."""
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
