"""The supported model families, and the choice of the one that fits a model.

A family is declared once, in gpt.py, llama.py or falcon.py: how its `config.json` is read as a
ModelConfig and written, and which parameters each of its tensors holds (mapping.py).
safetensors.py follows the declaration in both directions. Family names appear only in gptjax/hf/
and configs/.
"""

import json
from dataclasses import replace

from gptjax.config import ModelConfig, RopeConfig, from_dict, model_problems, to_dict
from gptjax.config.limits import out_of_range
from gptjax.errors import ConfigError, DataError, MismatchError
from gptjax.hf import falcon, gpt, llama
from gptjax.hf.reader import ConfigReader, Family, Json

FAMILIES: dict[str, Family] = gpt.FAMILIES | llama.FAMILIES | falcon.FAMILIES
"""By `model_type`."""


def read_config(config: Json, location: str) -> tuple[Family, ModelConfig, set[str]]:
    """The family and the model of a config.json, and the keys that were not used.

    `location` names the file in messages. Raises DataError for a missing or invalid value,
    MismatchError for a family or a setting that is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise MismatchError(
            f"{location}: model_type={kind!r}: not supported; supported: {', '.join(FAMILIES)}"
        )
    reader = ConfigReader(config, location)
    try:
        model = FAMILIES[kind].to_model(reader)
        from_dict(to_dict(model), ModelConfig, "model.")  # checks the types
        problems = [*model_problems(model), *out_of_range(model, "model.")]
        if problems:
            raise ConfigError(problems)
    except (TypeError, ValueError, ZeroDivisionError, ConfigError) as error:
        raise DataError(f"{location}: invalid value ({error})") from None
    return FAMILIES[kind], model, reader.unused()


def family_of(model: ModelConfig) -> tuple[str, Json]:
    """The `model_type` whose models include this one, and the model's config.json.

    Raises MismatchError if there is none, with the fields in which the nearest family differs.
    """
    differences: dict[str, list[str]] = {}
    unreadable = set()
    for name, family in FAMILIES.items():
        config = {"model_type": name, "architectures": [family.architecture]}
        config |= family.to_config(model)
        try:
            converted = family.to_model(ConfigReader(json.loads(json.dumps(config)), name))
        except (MismatchError, DataError) as error:
            differences[name] = [str(error)]
            unreadable.add(name)
            continue
        if not model.moe.experts:
            converted = replace(converted, moe=model.moe)
        ours, theirs = vars(_normalized(model)), vars(_normalized(converted))
        differs = [f"{k}: {ours[k]!r}, {theirs[k]!r} there" for k in ours if ours[k] != theirs[k]]
        if not differs:
            return name, config
        differences[name] = differs
    nearest = min(differences, key=lambda name: (name in unreadable, len(differences[name])))
    raise MismatchError(
        f"no Hugging Face architecture has this model; the nearest, {nearest}, differs in",
        differences[nearest],
    )


def _normalized(m: ModelConfig) -> ModelConfig:
    """The model with the fields fixed that change no logits, and defaults filled in."""
    return replace(
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
