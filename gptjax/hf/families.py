"""The Hugging Face families that are known, and the choice of one for a model.

A family is declared once, in the file of its kind (gpt.py, llama.py, falcon.py): how its
`config.json` reads as a ModelConfig and back, and which of its tensors holds which parameters
(mapping.py). safetensors.py follows the declaration both ways. Family names appear there, here and
in configs/ only.
"""

import json
from dataclasses import replace

from gptjax.config import ModelConfig, RopeConfig, from_dict, model_problems, to_dict
from gptjax.errors import ConfigError, DataError, MismatchError
from gptjax.hf import falcon, gpt, llama
from gptjax.hf.reader import Family, Json, Reader

FAMILIES: dict[str, Family] = gpt.FAMILIES | llama.FAMILIES | falcon.FAMILIES


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
