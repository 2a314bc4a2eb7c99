"""`gptjax convert`: conversions between Hugging Face folders and runs, each with a certificate.

RUN/source.json         the origin of an imported model: its config.json, its tensors' dtypes
RUN/certificate.json    the checks of the conversion

The certificate states whether the model, converted back, equals its source byte for byte, and how
far its logits are from those of `transformers` on the same weights, in float32, at positions up to
the end of the context, where a mistake in the rotary frequencies would show.
"""

import argparse
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import bucket, config, load_model
from gptjax.checkpoint import head, run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.cli.inspect import print_certificate
from gptjax.config import CheckpointConfig, ComputeConfig, Config, LoraConfig
from gptjax.config.limits import unknown_scheme
from gptjax.errors import ConfigError, MismatchError, OutputError
from gptjax.finetune import lora, peft
from gptjax.hf import families, read_tokenizer, safetensors, tokenizer_files
from gptjax.hf.carried_files import carry
from gptjax.hf.model_card import model_card
from gptjax.hf.safetensors import Source
from gptjax.hf.verify import SCORE_TENSOR, Json, compare_with_transformers
from gptjax.model import heads
from gptjax.model.decoder import Params
from gptjax.model.flops import ModelCost
from gptjax.parallel import mesh
from gptjax.runtime.progress import Progress
from gptjax.tokenizer import Tokenizer

_TOLERATED = 1e-2  # of the largest logit, and of the positions


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    (kind, source), (into, target) = map(_kind_and_folder, (args.source, args.target))
    if why := unknown_scheme(source):
        raise ConfigError([f"{source}: {why}"])
    if kind == "run" == into and not (bucket.path_of(source) / config.CONFIG_FILE).exists():
        raise ConfigError([f"{source}: is no run folder; a Hugging Face folder is hf:{source}"])
    if kind == "run" == into and load_model.is_hugging_face(source):
        raise ConfigError([f"{source}: is a Hugging Face folder; give hf:{source}"])
    if kind != "run" != into:
        what = f"convert {args.source} {args.target}"
        raise ConfigError([f"{what}: one of the two must be a run folder"])
    if into != "hf" and args.dtype:
        raise ConfigError([f"--dtype={args.dtype}: only of an export to hf:FOLDER"])
    if (kind == "peft") != (args.base is not None):
        raise ConfigError(["--base: the model that peft:FOLDER goes with, and only there"])
    progress, compare = Progress(), not args.no_compare
    with _made_here(target, into) as here:
        if kind == "hf":
            certificate = import_run(source, here, progress, compare=compare)
        elif kind == "peft":
            certificate = import_adapters(source, args.base, here, progress)
        elif into == "hf":
            certificate = export_run(source, here, progress, dtype=args.dtype, compare=compare)
        elif into == "peft":
            certificate = export_adapters(source, here, progress)
        else:
            certificate = merge_run(source, here, progress)
    print_certificate(certificate)


@contextmanager
def _made_here(target: str, into: str) -> Iterator[str]:
    """The folder to make the target in: one of this machine, uploaded at the end for a bucket."""
    if not bucket.remote(target):
        yield target
        return
    if why := unknown_scheme(target):
        raise ConfigError([f"{target}: {why}"])
    if any(bucket.path_of(target).glob("*")):
        raise OutputError(f"{target}: is not empty; give a new folder")
    with tempfile.TemporaryDirectory() as folder:
        if into == "run":
            with head.Head(folder).taken(lambda line: None):
                yield folder
            cfg = replace(config.load(folder), run=target)
            run_dir.write_json(Path(folder, config.CONFIG_FILE), config.to_dict(cfg))
        else:
            yield folder
        bucket.upload(Path(folder), target, head.HEAD)


def _kind_and_folder(path: str) -> tuple[str, str]:
    kind, colon, folder = path.partition(":")
    if colon and not folder:
        raise ConfigError([f"{path}: names no folder"])
    return (kind, folder) if colon and kind in ("hf", "peft") else ("run", path)


def import_run(folder: str, target: str, progress: Progress, *, compare: bool = True) -> Json:
    """Makes a run of a Hugging Face folder; returns its certificate.

    Raises DataError and MismatchError as `weights.open_source` does, before anything is written;
    OutputError where the target exists and is not empty, or cannot be written; MismatchError, with
    the run and its certificate in place, where the conversion turns out not to agree.
    """
    _one_process()
    load_model.check_exists(folder)
    source = safetensors.open_source(bucket.local_copy(folder))
    for note in source.notes:
        progress.say(note)
    tokenizer = read_tokenizer.tokenizer_of(source, progress.say)
    cfg = load_model.config_of(source.model, tokenizer, target)
    cfg.check(jax.device_count(), jax.process_count())
    path = Path(target)
    _new_folder(path)
    with mesh.entered_mesh(cfg):
        with progress.bar(
            "read", len(safetensors.parameter_shapes(source.model)), unit="tensor"
        ) as bar:
            params = safetensors.read_params(source, bar.update)
        carry(source.folder, path / _CARRIED)
        run_dir.record_imported(cfg, tokenizer, _provenance(source, folder))
        _save(path, 0, params, {"imported": folder})
        certificate = {
            "source": folder,
            "tensors": len(source.names),
        }
        _check_bytes(certificate, source, params, progress, path)
        if compare:
            _check_logits(certificate, source, params, progress, path)
        return certificate


def merge_run(folder: str, target: str, progress: Progress) -> Json:
    """Makes a run with the adapters of another merged into their base, which it needs no more.

    Returns where they came from. To be used, not trained further. Raises ConfigError for a run
    without adapters, OutputError where the target exists and is not empty, or cannot be written.
    """
    _one_process()
    begun = config.load(folder)
    tune = begun.finetune
    if not tune.lora.rank:
        raise ConfigError([f"{folder}: finetune.lora.rank=0, so it has no adapters to merge"])
    source = load_model.find_model(folder)
    assert source.tokenizer is not None
    path = Path(target)
    _new_folder(path)
    with mesh.entered_mesh(source.config_here()):
        params, step = source.read_params(progress.say)
        _save(path, step or 0, params, {"merged": folder})
    plain = replace(tune, lora=LoraConfig())
    begun = replace(begun, run=target, finetune=plain, train=replace(begun.train, ema_decay=0.0))
    run_dir.record_tuned(begun, source.tokenizer, run_dir.examples_of(folder) | {"merged": folder})
    return {"source": folder, "step": step, "base": tune.base}


def export_adapters(folder: str, target: str, progress: Progress) -> Json:
    """Writes a run's adapters in PEFT's layout; returns a summary.

    Raises ConfigError for a run without adapters, or with a layer of its task beside them, for
    which PEFT has no place; MismatchError as `peft.write_folder` does.
    """
    _one_process()
    source = load_model.find_model(folder)
    cfg = source.config_here()
    tune = cfg.finetune
    if not isinstance(source, load_model.AdapterRun):
        raise ConfigError([f"{folder}: finetune.lora.rank=0, so it has no adapters"])
    if tune.outputs:
        raise ConfigError(
            [
                f"{folder}: finetune.task={tune.task} has a layer and tokens of its own, which "
                "adapters alone do not carry; convert to hf:FOLDER, where all is merged"
            ]
        )
    path = Path(target)
    _new_folder(path)
    with mesh.entered_mesh(replace(cfg, compute=ComputeConfig())):
        tree, step = source.read_tree(progress.say)
        adapters, base = tree[lora.ADAPTERS], tune.base.removeprefix("hf:")
        if base == tune.base:  # a run, which PEFT cannot load: where it came from, if anywhere
            base = (run_dir.source_of(base) or {}).get("folder", "")
        peft.write_folder(path, adapters, tune.lora, cfg.model, base)
    count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    return {
        "source": folder,
        "step": step,
        "base": tune.base,
        "base_model_name_or_path": base or f"none: export it, gptjax convert {tune.base} hf:FOLDER",
        "parameters": count,
    }


def import_adapters(folder: str, base: str, target: str, progress: Progress) -> Json:
    """Makes a run of PEFT's adapters merged into their base, a run or hf:FOLDER.

    Returns a summary. Before anything is written raises ConfigError for a base that is itself
    fine-tuned, and what opening the base and `peft.read_folder` raise; OutputError where the target
    exists and is not empty.
    """
    _one_process()
    path = Path(target)

    def check(cfg: Config, _: Tokenizer | None) -> None:
        if cfg.finetune.task != "none":
            raise ConfigError([f"--base={base}: is fine-tuned; give what the adapters began from"])

    with load_model.load_model(base, say=progress.say, check=check) as model:
        adapters, lora_cfg = peft.read_folder(bucket.local_copy(folder), model.cfg.model)
        _new_folder(path)
        whole = lora.merge({lora.BASE: model.params, lora.ADAPTERS: adapters}, lora_cfg)
        _save(path, model.step or 0, whole, {"imported": folder})
        beside, settings = base.removeprefix("hf:"), {}
        if load_model.is_hugging_face(base):
            settings = safetensors.open_source(bucket.local_copy(beside)).config
        elif provenance := run_dir.source_of(base):
            beside, settings = f"{beside}/{_CARRIED}", provenance["config"]
        if settings:
            carry(bucket.local_copy(beside), path / _CARRIED)
        train = replace(model.cfg.train, ema_decay=0.0)
        cfg = replace(model.cfg, run=target, train=train, stages={})
        source = {"folder": folder, "base": base, "config": settings, "dtypes": {}}
        run_dir.record_imported(cfg, model.tokenizer, source)
    return {"source": folder, "base": base, "rank": lora_cfg.rank, "scale": lora_cfg.scale}


def _save(folder: Path, step: int, params: Params, meta: Json) -> None:
    """Saves the only checkpoint of a run that is not trained."""
    checkpoints = Checkpointer(folder / run_dir.CHECKPOINTS, CheckpointConfig(), lambda step: meta)
    with checkpoints:
        checkpoints.save(step, {"step": jnp.int32(step), "params": params})
        checkpoints.finish()


def export_run(
    folder: str, target: str, progress: Progress, *, dtype: str | None, compare: bool = True
) -> Json:
    """Writes a run's newest checkpoint as a Hugging Face folder; returns its certificate.

    Tensors have the formats of the source where the run was imported and float32 otherwise, or
    `dtype`. A run of labels or choices becomes a model for sequence classification, whose scores
    are compared. Raises MismatchError where no Hugging Face architecture has this model, and where
    the folder, written, turns out not to agree.
    """
    _one_process()
    model = load_model.find_model(folder)
    cfg, tokenizer = model.config_here(), model.tokenizer
    families.family_of(cfg.model)  # refuses before anything is read
    provenance = run_dir.source_of(folder)
    path = Path(target)
    _new_folder(path)
    formats = {} if dtype or provenance is None else provenance["dtypes"]
    parameters = ModelCost(cfg.model).parameters.total
    with mesh.entered_mesh(replace(cfg, compute=ComputeConfig())):  # compared in float32
        params, step = model.read_params(progress.say)
        extra = {} if provenance is None else provenance["config"]
        extra = {key: value for key, value in extra.items() if key != "torch_dtype"}
        extra |= _write_tokenizer(folder, path, tokenizer, cfg)
        card = model_card(cfg, path.resolve().name, parameters, step)
        (path / "README.md").write_text(card, "utf-8")
        common = (
            safetensors.FORMATS_BY_NAME[dtype]
            if dtype
            else (Counter(formats.values()).most_common(1) or [("F32", 0)])[0][0]
        )
        beside, instead = _task_layer(folder, cfg, params, tokenizer)
        safetensors.write_folder(
            path,
            params,
            cfg.model,
            dtype=common,
            dtypes=formats,
            extra_config=extra,
            extra_tensors=beside,
            config_overrides=instead,
        )
        source = safetensors.open_source(path, beside)
        certificate = {
            "source": folder,
            "step": step,
            "tensors": len(source.names),
            "format": common,
        }
        _check_bytes(certificate, source, params, progress, path)
        del params
        if compare and beside:
            _check_scores(certificate, source, progress, path)
        elif compare:  # as they were written: a narrower format is not a mistake
            _check_logits(certificate, source, safetensors.read_params(source), progress, path)
        if tokenizer is not None:
            carried = (bucket.path_of(folder) / _CARRIED).is_dir()
            _check_tokenizer(certificate, tokenizer, progress, path, carried=carried)
        return certificate


def _write_tokenizer(folder: str, path: Path, tokenizer: Tokenizer | None, cfg: Config) -> Json:
    """Writes the tokenizer of a run and its generation settings; returns their part of config.json.

    Those of an imported model are its own files.
    """
    if (bucket.path_of(folder) / _CARRIED).is_dir():
        carry(bucket.local_copy(f"{folder}/{_CARRIED}"), path)
        return {}
    if tokenizer is None:
        return {}
    tokenizer_files.write_tokenizer(path, tokenizer, cfg.model.context)
    generation = tokenizer_files.generation_config(tokenizer)
    run_dir.write_json(path / "generation_config.json", generation)
    return {key: generation[key] for key in ("bos_token_id", "eos_token_id")}


def _task_layer(
    folder: str, cfg: Config, params: Params, tokenizer: Tokenizer | None
) -> tuple[dict[str, np.ndarray], Json]:
    """The task head as a tensor by its Hugging Face name, and its part of config.json.

    transformers applies the head to the last token that is not padding, so the padding token may be
    any but the extract token.
    """
    if not cfg.finetune.outputs:
        return {}, {}
    assert tokenizer is not None
    kind, _ = families.family_of(cfg.model)
    names = dict(enumerate(cfg.finetune.labels or ("score",)))
    several = len(names) > 1
    return {SCORE_TENSOR: np.ascontiguousarray(np.asarray(params[heads.NAME]["score"]).T)}, {
        "architectures": [families.FAMILIES[kind].classifier],
        "id2label": {str(i): name for i, name in names.items()},
        "label2id": {name: i for i, name in names.items()},
        "problem_type": "single_label_classification" if several else None,
        "pad_token_id": tokenizer.eos_id,
        "task_specific_params": {cfg.finetune.task: run_dir.examples_of(folder)["special"]},
    }


def _one_process() -> None:
    if jax.process_count() > 1:
        raise ConfigError([f"convert: runs in one process, not in {jax.process_count()}"])


_CARRIED = "source"


def _new_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(file.name != head.HEAD for file in path.iterdir()):  # see `_made_here`
            raise OutputError(f"{path}: is not empty; give a new folder")
        probe = path / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from None


def _provenance(source: Source, folder: str) -> Json:
    return {
        "folder": folder,
        "config": source.config,
        "dtypes": {name: source.dtype(name) for name in source.names},
    }


# --- the certificate ---------------------------------------------------------------------------


def _check_bytes(
    certificate: Json, source: Source, params: Params, progress: Progress, folder: Path
) -> None:
    """Adds to the certificate whether the parameters give the folder's tensors byte for byte.

    Raises MismatchError where they do not.
    """
    differ = _differing(source, params, progress)
    certificate["round trip"] = {"differ": differ} if differ else "byte-equal"
    certificate["transformers"] = "not compared"
    run_dir.write_json(folder / run_dir.CERTIFICATE, certificate)
    if differ:
        raise _disagreement(source, folder)


def _check_logits(
    certificate: Json, source: Source, params: Params, progress: Progress, folder: Path
) -> None:
    """Adds to the certificate how far the logits are from those of `transformers`.

    Raises MismatchError where they are far.
    """
    certificate["transformers"] = logits = compare_with_transformers(source, params, progress)
    run_dir.write_json(folder / run_dir.CERTIFICATE, certificate)
    if isinstance(logits, dict) and (
        logits["largest_difference"] > _TOLERATED * logits["largest_logit"]
        or logits["argmax_agreement"] < 1 - _TOLERATED
    ):
        raise _disagreement(source, folder)


def _check_tokenizer(
    certificate: Json, tokenizer: Tokenizer, progress: Progress, folder: Path, *, carried: bool
) -> None:
    """Adds to the certificate in how many texts the folder's tokenizer differs from the run's.

    Raises MismatchError, with the first difference, where there are any. With `carried` they are
    only told: the files are those of the imported model, as they were.
    """
    progress.say("comparing the tokenizer")
    certificate["tokenizer"] = result = tokenizer_files.compare_tokenizer(folder, tokenizer)
    run_dir.write_json(folder / run_dir.CERTIFICATE, certificate)
    if not isinstance(result, dict) or not result["differ"]:
        return
    what = next(key for key, value in result.items() if isinstance(value, dict))
    given, own, other = (result[what][key] for key in ("of", "run", "folder"))
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, other, strict=False))
    at = len(list(equal))
    difference = (
        f"{folder}: {result['with']} makes another tokenizer of it than the run's: the {what} of "
        f"{given[:40]!r}, from place {at} on: {other[at : at + 8]!r}, {own[at : at + 8]!r} in the "
        f"run; {result['differ']} of {result['texts']} texts and {result['tokens']} tokens differ"
    )
    if carried:
        progress.say(difference)
    else:
        raise MismatchError(f"{difference}. Its weights are right; use the run's own tokenizer")


def _disagreement(source: Source, folder: Path) -> MismatchError:
    return MismatchError(
        f"{source.folder} and the run do not agree; see {folder / run_dir.CERTIFICATE}"
    )


def _differing(source: Source, params: Params, progress: Progress) -> list[str]:
    """Names of tensors whose bytes, made from the parameters, differ from the folder's."""
    differ = []
    with progress.bar("compare bytes", len(source.names), unit="tensor") as bar:
        made = safetensors.tensors(params, source.model, source.family)
        for count, (name, value) in enumerate(made, 1):
            made_again, original = safetensors.cast(value, source.dtype(name)), source.tensor(name)
            bits = f"u{original.itemsize}"  # as integers, so that NaNs compare by their bits
            if not np.array_equal(made_again.view(bits), original.view(bits)):
                differ.append(name)
            bar.update(count)
    return differ


def _check_scores(certificate: Json, source: Source, progress: Progress, folder: Path) -> None:
    """Adds to the certificate how far a task's scores are from those of `transformers`."""
    certificate["transformers"] = scores = compare_with_transformers(source, {}, progress)
    run_dir.write_json(folder / run_dir.CERTIFICATE, certificate)
    if isinstance(scores, dict) and (
        scores["largest_difference"] > _TOLERATED * scores["largest_score"]
    ):
        raise _disagreement(source, folder)
