"""Loading of a configuration: presets, JSON, run folders, overrides, and each value's provenance.

A CONFIG argument is one of
  * a preset that comes with gptjax, `gpt2:small`, or a Python file and a function in it,
    `configs/gpt2.py:small` (default: `main`);
  * a resolved configuration: a JSON file as `gptjax config --json` prints it;
  * a run folder, which contains such a file as `config.json`.
The last two may lie in a bucket.
"""

import dataclasses
import difflib
import importlib.util
import itertools
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gptjax import bucket
from gptjax.config.limits import unknown_scheme
from gptjax.config.mesh import MeshConfig
from gptjax.config.presets import find_preset
from gptjax.config.schema import Config, MixturePart, StageConfig
from gptjax.errors import ConfigError

CONFIG_FILE = "config.json"


def to_dict(cfg: Any) -> dict[str, Any]:
    """The configuration as nested dicts of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """The values of all fields by dotted name."""
    leaves: dict[str, Any] = {}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{f.name}.")
        elif isinstance(value, Mapping):
            for name, part in value.items():
                dotted = f"{prefix}{f.name}.{name}"
                deeper = dataclasses.is_dataclass(part)
                leaves |= flatten(part, f"{dotted}.") if deeper else {dotted: part}
        else:
            leaves[prefix + f.name] = value
    return leaves


# Names that other trainers have for our fields.
_ELSEWHERE = {
    "optim.lr": ("learning_rate", "max_lr", "base_lr", "peak_lr"),
    "optim.final_lr_ratio": ("min_lr", "min_lr_ratio", "lr_min", "final_lr"),
    "optim.lr_schedule": ("lr_scheduler", "lr_scheduler_type", "scheduler", "lr_decay_style"),
    "optim.warmup_tokens": ("warmup_steps", "warmup_ratio", "warmup_iters", "num_warmup_steps"),
    "optim.decay_tokens": ("decay_steps", "lr_decay_iters", "cooldown_steps", "decay"),
    "optim.b1": ("beta1", "adam_beta1", "betas"),
    "optim.b2": ("beta2", "adam_beta2"),
    "optim.eps": ("epsilon", "adam_epsilon"),
    "optim.clip": ("grad_clip", "max_grad_norm", "clip_grad", "gradient_clipping", "grad_norm"),
    "optim.name": ("optimizer", "optim", "optimizer_type"),
    "train.batch_tokens": (
        *("batch_size", "global_batch_size", "train_batch_size", "micro_batch_size"),
        *("per_device_batch_size", "per_device_train_batch_size"),
    ),
    "train.tokens": ("steps", "max_steps", "max_iters", "num_train_steps", "train_iters", "epochs"),
    "train.seq_len": (
        "block_size",
        "seq_length",
        "max_seq_len",
        "sequence_length",
        "context_length",
    ),
    "train.accumulation": ("gradient_accumulation_steps", "grad_accum", "accumulation_steps"),
    "model.layers": ("n_layer", "num_layers", "num_hidden_layers", "n_layers", "depth"),
    "model.heads": ("n_head", "num_heads", "num_attention_heads", "n_heads"),
    "model.kv_heads": ("n_kv_heads", "num_key_value_heads", "n_kv_head"),
    "model.embed": ("n_embd", "hidden_size", "d_model", "dim", "emb_dim"),
    "model.mlp": ("intermediate_size", "ffn_dim", "d_ff", "mlp_dim"),
    "model.context": ("max_position_embeddings", "n_positions", "n_ctx"),
    "compute.remat": ("gradient_checkpointing", "activation_checkpointing", "recompute"),
    "compute.dtype": ("bf16", "fp16", "precision", "mixed_precision"),
    "checkpoint.every": ("save_every", "save_steps", "save_interval", "checkpoint_interval"),
    "eval.every": ("eval_steps", "eval_interval", "eval_every"),
    "log.every": ("log_interval", "logging_steps", "log_every"),
    "start.base": ("init_from", "resume_from", "load_path", "pretrained", "model_name_or_path"),
    "data.sources": ("dataset", "data_path", "train_data", "dataset_path", "train_files"),
}
_OURS = {name: ours for ours, others in _ELSEWHERE.items() for name in others}


def _known_elsewhere(dotted: str) -> str:
    """Our name of a field that other trainers call so; empty for any other.

    Evaluation and fine-tuning have sizes of their own, which a name below them means.
    """
    section, _, name = dotted.rpartition(".")
    ours = _OURS.get(name, "")
    if section.startswith(("eval", "finetune")) and not ours.startswith(section):
        return ""
    return f"{ours} (in tokens)" if ours.endswith("tokens") else ours


def from_dict(values: Mapping[str, Any], cls: type = Config, prefix: str = "") -> Any:
    """The configuration (or section, `cls`) of nested dicts; the inverse of `to_dict`.

    Absent fields take their defaults. Raises ConfigError with all unknown fields, each with the
    nearest known names, and all values of a wrong type.
    """
    hints = typing.get_type_hints(cls)
    problems, known = [], {}
    for name, value in values.items():
        dotted = prefix + name
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=2)
            hint = (
                f"here it is {elsewhere}"
                if (elsewhere := _known_elsewhere(dotted))
                else f"did you mean {' or '.join(prefix + n for n in near)}?"
                if near
                else (f"known here: {', '.join(hints)}")
            )
            problems.append(f"{dotted}: unknown field; {hint}")
        elif dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                problems.append(f"{dotted}={value!r}: must be an object of fields")
                continue
            try:
                known[name] = from_dict(value, hints[name], f"{dotted}.")
            except ConfigError as error:
                problems += error.problems
        else:
            try:
                known[name] = _coerce(value, hints[name], dotted)
            except TypeError as error:
                problems.append(f"{dotted}={value!r}: {error}")
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    return cls(**known)


def _coerce(value: Any, hint: Any, prefix: str) -> Any:
    """Converts a JSON value to the type of its field, whose name is the prefix.

    Raises TypeError naming that type, ConfigError for fields below it.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise TypeError(f"must be one of {', '.join(map(str, args))}")
    if origin is types.UnionType:
        if value is None and types.NoneType in args:
            return None
        return _coerce(value, next(a for a in args if a is not types.NoneType), prefix)
    if origin is Mapping:
        deeper = dataclasses.is_dataclass(args[1])
        if not isinstance(value, Mapping):
            raise TypeError(f"must be an object of {'objects' if deeper else 'numbers'}")
        coerce = lambda part, name: (
            from_dict(part, args[1], f"{name}.") if deeper else _coerce(part, args[1], name)
        )
        return {str(key): coerce(part, f"{prefix}.{key}") for key, part in value.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("must be a list")
        return tuple(_coerce(item, args[0], prefix) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise TypeError("is too large") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(f"must be of type {hint.__name__}")
    return value


def load(argument: str) -> Config:
    """The configuration of a CONFIG argument. Raises ConfigError."""
    if "://" in argument:
        return _in_bucket(argument)
    path, _, function = argument.partition(":")
    if not path:
        raise ConfigError([f"CONFIG={argument!r}: is empty; give a preset, a file or a run folder"])
    file = Path(path)
    if file.is_dir():
        file = file / CONFIG_FILE
        if not file.exists():
            raise ConfigError([f"{path}: not a run folder, it has no {CONFIG_FILE}"])
        return dataclasses.replace(read_json(file), run=path)  # also where it was moved or copied
    if not file.exists() and (preset := find_preset(path)):
        file = preset
    if not file.exists():
        folder = file.parent if file.parent.is_dir() else Path("configs")
        near = difflib.get_close_matches(
            file.name, [p.name for p in folder.glob("[!_]*.py")], n=2, cutoff=0.4
        )
        hint = f"; did you mean {' or '.join(str(folder / n) for n in near)}?" if near else ""
        raise ConfigError([f"{path}: no such file{hint}"])
    if file.suffix == ".json":
        return read_json(file)
    if file.suffix == ".py":
        return _preset(file, function or "main")
    raise ConfigError([f"{path}: not a CONFIG; give a .py preset, a .json file or a run folder"])


def is_resolved(argument: str) -> bool:
    """Whether a CONFIG argument is a whole configuration, JSON or a run folder, and no preset."""
    return "://" in argument or Path(argument).is_dir() or argument.endswith(".json")


def on_machine(
    machine: str,
    preset: str,
    mesh: MeshConfig,
    *,
    compute: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
) -> Config:
    """A preset on this mesh of a machine of the planner, with further fields of two sections.

    Its run folder is named after the machine too, and each shard evaluates at least a row.
    Raises ConfigError.
    """
    cfg = load(preset)
    shards = mesh.data * mesh.fsdp * mesh.expert
    return dataclasses.replace(
        cfg,
        run=f"{cfg.run}-{machine.replace(':', '-')}",
        compute=dataclasses.replace(cfg.compute, **compute or {}),
        mesh=dataclasses.replace(mesh, machine=machine),
        train=dataclasses.replace(cfg.train, **train or {}),
        eval=dataclasses.replace(cfg.eval, batch=max(1, -(-cfg.eval.batch // shards)) * shards),
    )


def _in_bucket(place: str) -> Config:
    """The configuration of a run, or in a JSON file, in a bucket. Raises ConfigError."""
    if why := unknown_scheme(place):
        raise ConfigError([f"{place}: {why}"])
    path = bucket.path_of(place)
    if place.endswith(".json"):
        return read_json(path)
    if not (path / CONFIG_FILE).exists():
        raise ConfigError([f"{place}: not a run folder, it has no {CONFIG_FILE}"])
    return dataclasses.replace(read_json(path / CONFIG_FILE), run=place)


def read_json(file: Any) -> Config:
    """The configuration of a resolved JSON file. Raises ConfigError."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError([f"{file}: no such file"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"{file}: not valid JSON: {error}"]) from None
    if not isinstance(values, Mapping):
        raise ConfigError([f"{file}: must contain a JSON object"])
    return from_dict(values)


def _preset(file: Path, function: str) -> Config:
    """The result of a preset function, executed without writing bytecode beside the file."""
    spec = importlib.util.spec_from_file_location(f"gptjax_preset_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    presets = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }
    if function not in presets:
        near = difflib.get_close_matches(function, presets, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(presets)}"
        raise ConfigError([f"{file}:{function}: no such preset; {hint}"])
    return presets[function]()


def resolve(
    argument: str, overrides: Sequence[str], prog: str = "gptjax", description: str = ""
) -> Config:
    """The configuration of a command line: CONFIG, then `--section.field value` overrides.

    For an invalid override, tyro prints the problem and the nearest names, and exits with status 2.
    """
    return override(load(argument), overrides, f"{prog} {argument}", description)


def override(preset: Config, overrides: Sequence[str], prog: str, description: str = "") -> Config:
    """The configuration with `--section.field value` overrides, parsed by tyro."""
    if not overrides:
        return preset
    overrides = in_full(overrides)
    if "--stages" in overrides and overrides[overrides.index("--stages") + 1 :][:1] == ["none"]:
        at = overrides.index("--stages")
        overrides = [*overrides[:at], *overrides[at + 2 :]]
        preset = dataclasses.replace(preset, stages={})
    preset = _with_named_parts(preset, overrides)
    known = flatten(preset)
    given = [word[2:].partition("=")[0].replace("-", "_") for word in overrides if word[:2] == "--"]
    if problems := [
        f"--{name}: unknown option; here it is --{ours}"
        for name in given
        if name not in known and (ours := _known_elsewhere(name))
    ]:
        raise ConfigError(problems)
    import tyro

    return tyro.cli(
        Config,
        default=preset,
        args=overrides,
        prog=prog,
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )


def _with_named_parts(preset: Config, overrides: Sequence[str]) -> Config:
    """The configuration with an entry of each mapping for each new name that the overrides give:
    an empty part or stage, and in a stage a weight of 0."""
    given = [word[2:].partition("=")[0].split(".") for word in overrides if word[:2] == "--"]
    parts, stages = dict(preset.data.mixture), dict(preset.stages)
    for words in given:
        match words:
            case ["data", "mixture", name, _]:
                parts.setdefault(name, MixturePart())
            case ["stages", name, _]:
                stages.setdefault(name, StageConfig())
            case ["stages", name, "weights", part]:
                one = stages.setdefault(name, StageConfig())
                stages[name] = dataclasses.replace(one, weights={part: 0.0, **one.weights})
    data = dataclasses.replace(preset.data, mixture=parts)
    return dataclasses.replace(preset, data=data, stages=stages)


def in_full(overrides: Sequence[str]) -> list[str]:
    """Overrides with what may be left out: `--start BASE` is `--start.base BASE`, and a field that
    is true or false is made true by its name alone. Raises ConfigError for an empty --start.
    """
    classes, words = flatten(Config()), []
    for word, following in itertools.pairwise([*overrides, "--"]):
        name, equals, value = word.partition("=")
        if name == "--start" and not (value if equals else following):
            raise ConfigError(["--start is empty; give RUN, RUN@STEP or hf:FOLDER"])
        words.append(f"--start.base{equals}{value}" if name == "--start" else word)
        named = isinstance(classes.get(name[2:].replace("-", "_")), bool) and not equals
        if name.startswith("--") and named and following.startswith("--"):
            words.append("True")
    return words


def provenance(cfg: Config, argument: str, overrides: Sequence[str]) -> dict[str, str]:
    """The origin of each field by dotted name: default, command line, or the name of the preset or
    of the base that it starts from."""
    words = in_full(overrides)
    given = {word[2:].split("=")[0].replace("-", "_") for word in words if word[:2] == "--"}
    defaults, preset = flatten(Config()), flatten(load(argument))
    return {
        name: "command line"
        if name in given
        else "default"
        if name not in preset
        else cfg.start.base  # its model and tokenizer, which the preset does not have
        if value != preset[name]
        else argument
        if name not in defaults or preset[name] != defaults[name]
        else "default"
        for name, value in flatten(cfg).items()
    }
