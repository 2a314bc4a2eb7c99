"""The command line: subcommands, dispatch, and how an error is told. Nothing else.

Each command imports what it needs when it runs, so `--help` and a bad flag cost no import of jax or
TensorFlow.
"""

import argparse
import gc
import json
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from gptjax import config
from gptjax.cli import arguments
from gptjax.errors import ConfigError, DataError, GptjaxError, Preempted
from gptjax.runtime import malloc
from gptjax.runtime.progress import Progress

CONFIG_HELP = (
    "a preset (configs/gpt2.py:small), a JSON file, or a run folder; then overrides such as "
    "--optim.lr 3e-4 (`gptjax config CONFIG --help` lists them all)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. A GptjaxError is told in a sentence, no traceback."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.takes_overrides and args.config is None:
        if {"-h", "--help"} & set(rest):
            args.subparser.print_help()
            return 0
        args.subparser.error("the following arguments are required: CONFIG")
    malloc.keep_memory()
    gc.set_threshold(100_000)  # imports and traces stay: looking through them often takes 0.2 s
    try:
        args.command(args, rest)
        return 0
    except GptjaxError as error:
        print(f"gptjax: {error}{_how_to_go_on(args, argv, error)}", file=sys.stderr)
        if not isinstance(error, Preempted):  # which all processes of a job are together
            _leave_job(error.exit_code, str(error))
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("gptjax: interrupted", file=sys.stderr)
        _leave_job(130, "it was interrupted")
        return 130
    except Exception as error:  # a defect of ours: the others are not to wait for this process
        if "gptjax.runtime.distributed" in sys.modules:
            traceback.print_exc()
            _leave_job(1, f"{type(error).__name__}: {error}"[:500])
        raise


def _leave_job(code: int, why: str) -> None:
    """Of several processes, ends this one, with word to the others."""
    if "gptjax.runtime.distributed" in sys.modules:  # otherwise it has joined nothing
        from gptjax.runtime import distributed

        distributed.leave(code, f"{distributed.name()} has ended: {why}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptjax", description="Generative pre-training in JAX: data, training, samples."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(under: Any, name: str, run: Any, text: str, *, overrides: bool = False) -> Any:
        # A command with overrides leaves --help after CONFIG to tyro, which lists them.
        sub = under.add_parser(
            name, help=text, description=text, add_help=not overrides, allow_abbrev=not overrides
        )
        sub.set_defaults(command=run, takes_overrides=overrides, subparser=sub)
        if overrides and run is not _finetune:
            sub.add_argument("config", metavar="CONFIG", nargs="?", help=CONFIG_HELP)
        return sub

    command(
        commands,
        "train",
        _train,
        "Train CONFIG in its run folder, from where it stands; prepares the data if need be.",
        overrides=True,
    )
    sub = command(
        commands,
        "finetune",
        _finetune,
        "Teach the model of RUN, or of a Hugging Face folder, a task from labelled examples; in a "
        "run folder of its own, from where that stands.",
        overrides=True,
    )
    arguments.finetune(sub)
    sub = command(
        commands,
        "predict",
        _predict,
        "Label the lines of a file by a fine-tuned run, with probabilities.",
    )
    arguments.predict(sub)
    sub = command(
        commands,
        "eval",
        _eval,
        "Loss and bits per byte of a run on its validation text, or of a run or a Hugging Face "
        "folder on any text; and how it does on tasks.",
    )
    arguments.evaluate(sub)
    sub = command(
        commands,
        "sample",
        _sample,
        "Continue prompts, lines of a file, or what is typed, with the model of a run or of a "
        "Hugging Face folder.",
    )
    arguments.sample(sub)
    sub = command(
        commands,
        "serve",
        _serve,
        "Serve the model of a run or of a Hugging Face folder over HTTP: the completions interface "
        "that clients know, and a page to try it on.",
    )
    arguments.serve(sub)
    sub = command(
        commands,
        "plan",
        _plan,
        "Predict whether and how a training run of CONFIG fits a machine, and what it costs; "
        "needs no accelerator.",
        overrides=True,
    )
    arguments.plan(sub)
    sub = command(
        commands,
        "convert",
        _convert,
        "Make a run of a Hugging Face folder, or the reverse: convert hf:FOLDER RUN, or RUN "
        "hf:FOLDER. Compares the logits with those of transformers where it is installed. "
        "peft:FOLDER is a run's adapters alone, in PEFT's layout; of a run with adapters, another "
        "RUN is the one in which they are merged.",
    )
    sub.add_argument("source", metavar="FROM", help="a run folder, hf:FOLDER or peft:FOLDER")
    sub.add_argument("target", metavar="TO", help="a new run folder, hf:FOLDER or peft:FOLDER")
    sub.add_argument("--base", metavar="RUN", help="of peft:FOLDER: the run or hf:FOLDER it is for")
    sub.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of exported tensors (an imported run's own formats, otherwise float32)",
    )
    sub.add_argument("--no-compare", action="store_true", help="leave transformers alone")
    sub = command(commands, "inspect", _inspect, "What a run holds, and its certificate if any.")
    sub.add_argument("run", metavar="RUN", help="a run folder")

    data = commands.add_parser("data", help="Prepare and inspect training data.")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    command(
        actions,
        "prepare",
        _data_prepare,
        "Train or load the tokenizer and tokenize CONFIG's text into its store.",
        overrides=True,
    )
    command(
        actions, "verify", _data_verify, "Hash CONFIG's store against its manifest.", overrides=True
    )
    sub = command(
        actions, "show", _data_show, "Print the training batch of a step.", overrides=True
    )
    sub.add_argument("--step", type=int, default=1, help="the step whose batch to show (1)")
    sub = command(
        actions, "bench", _data_bench, "Tokens a second through the input pipeline.", overrides=True
    )
    sub.add_argument("--seconds", type=float, default=5.0, help="how long to measure (5)")

    tokenizer = commands.add_parser("tokenizer", help="Train and look at tokenizers.")
    actions = tokenizer.add_subparsers(required=True, metavar="ACTION")
    sub = command(
        actions,
        "train",
        _tokenizer_train,
        "Train a tokenizer on text and tell its speed, and its compression of held-out documents.",
    )
    arguments.tokenizer_train(sub)
    sub = command(actions, "show", _tokenizer_show, "Print the tokens of a text.")
    sub.add_argument("folder", metavar="FOLDER", help="a folder that holds a tokenizer")
    sub.add_argument("--text", required=True, help="the text, taken as a document")

    sub = command(
        commands,
        "config",
        _config,
        "Print CONFIG resolved, and where each value came from.",
        overrides=True,
    )
    sub.add_argument("--json", action="store_true", help="print JSON, itself a valid CONFIG")
    sub.add_argument(
        "--count", action="store_true", help="print parameters and FLOPs instead; allocates nothing"
    )
    return parser


def _how_to_go_on(args: argparse.Namespace, argv: Sequence[str], error: GptjaxError) -> str:
    """For a training run that ended early: what is safe, and how to continue."""
    cfg = getattr(args, "resolved", None)
    if args.command not in (_train, _finetune) or cfg is None or isinstance(error, ConfigError):
        return ""
    from gptjax.checkpoint.checkpointer import Checkpointer
    from gptjax.checkpoint.run_dir import CHECKPOINTS
    from gptjax.runtime import distributed

    if not distributed.first():
        return ""
    folder = os.path.join(cfg.run, CHECKPOINTS)
    steps = Checkpointer(pathlib.Path(folder)).steps()
    safe = f"last committed step {steps[-1]} in {folder}" if steps else f"no checkpoint in {folder}"
    return f"; {safe}; to continue: gptjax {shlex.join(argv)}"


def _resolve(args: argparse.Namespace, overrides: Sequence[str]) -> config.Config:
    """The checked configuration of a command with overrides."""
    cfg = config.resolve(args.config, overrides, args.subparser.prog, args.subparser.format_help())
    cfg.check()
    args.resolved = cfg
    return cfg


def _prepare(cfg: config.Config, progress: Progress) -> Any:
    """The manifest of the configured store, which is made now if it is not there."""
    from gptjax.data import prepare

    with prepare.shown(progress) as tell:
        return prepare.prepare(cfg, tell, progress.say)


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    cfg = _resolve(args, overrides)
    if cfg.finetune.task != "none":
        what = f"finetune.task={cfg.finetune.task}: `gptjax finetune` is what learns it"
        raise ConfigError([what])
    from gptjax import evaluate
    from gptjax.checkpoint import run_dir
    from gptjax.parallel import mesh
    from gptjax.runtime import distributed, watchdog

    evaluate.read_tasks(cfg.eval.tasks)  # so that a bad line is told before text is prepared
    distributed.join(cfg.watch.lost, Progress().say)
    progress = Progress(shown=distributed.first())
    with watchdog.Watchdog(cfg.watch) as watched, run_dir.claim(cfg, progress.say) as changes:
        for change in changes:
            progress.say(f"changed since the run was begun: {change}")
        import jax

        from gptjax.pretrain import pretrain

        cfg.check(jax.device_count(), jax.process_count())
        watched.at("prepare", 0)
        with distributed.first_before_others():
            manifest = _prepare(cfg, progress)
        watched.at("restore", 0)
        with mesh.entered_mesh(cfg):
            result = pretrain(cfg, manifest, watched, progress)
    if distributed.first():
        print(json.dumps({"run": cfg.run, **result}))


def _finetune(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    asked = {"-h", "--help"} & set(overrides)
    missing = [f"--{name}" for name in ("task", "data", "valid") if getattr(args, name) is None]
    if missing and not asked:
        args.subparser.error(f"the following arguments are required: {', '.join(missing)}")
    prog, text = f"{args.subparser.prog} {args.config}", args.subparser.format_help()
    override = lambda cfg: config.override(cfg, overrides, prog, text)
    if asked:
        override(config.Config())
    from gptjax.cli import finetune

    resolved = lambda cfg: setattr(args, "resolved", cfg)
    cfg, result = finetune.fit(args.config, args.task, args.data, args.valid, override, resolved)
    from gptjax.runtime import distributed

    if distributed.first():
        print(json.dumps({"run": cfg.run, **result}))


def _predict(args: argparse.Namespace, _: Sequence[str]) -> None:
    from gptjax.cli import predict

    progress = Progress()
    count = predict.predict(args.run, args.file, args.output, progress)
    progress.say(f"{args.output}: {count:,} lines")


def _eval(args: argparse.Namespace, _: Sequence[str]) -> None:
    from dataclasses import fields

    from gptjax.cli import eval
    from gptjax.runtime import distributed

    distributed.join(config.WatchConfig().lost, Progress().say)
    first = distributed.first()
    chosen = {field.name: getattr(args, field.name) for field in fields(eval.Options)}
    say = print if first else (lambda line: None)
    eval.evaluate(args.run, eval.Options(**chosen), Progress(shown=first), say)


def _refuse_unused(args: argparse.Namespace) -> None:
    """Raises ConfigError for options of `sample` that its mode would not heed."""
    drawing = (
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "logit_bias", "ban", "stop", "seed"),
    )
    unused = {
        "--beams": (args.beams, (*drawing, "logprobs", "rows")),
        "--file": (args.file, ("json",)),
        "--interactive": (args.interactive, ("json", "logprobs", "samples", "rows")),
        "--bench": (
            args.bench,
            (*drawing, "logprobs", "samples", "max_tokens", "json", "rows", "beams"),
        ),
        "without --beams": (not args.beams, ("length_penalty", "early_stopping")),
    }
    problems = [
        f"--{name.replace('_', '-')}: means nothing {mode if ' ' in mode else f'with {mode}'}"
        for mode, (on, names) in unused.items()
        for name in names
        if on and getattr(args, name) != args.subparser.get_default(name)
    ]
    if problems:
        raise ConfigError(problems)


def _sample(args: argparse.Namespace, _: Sequence[str]) -> None:
    from gptjax.cli import sample
    from gptjax.sample import BeamSearchParams, SamplingParams

    settings = SamplingParams(
        logit_bias=tuple(args.logit_bias),
        banned=tuple(args.ban),
        stop=tuple(args.stop),
        **{name: getattr(args, name) for name in sample.PLAIN},
    )
    settings.check()
    _refuse_unused(args)
    beams = None
    if args.beams:
        early = {"false": False, "true": True, "never": "never"}[args.early_stopping]
        beams = BeamSearchParams(
            args.beams, args.length_penalty, early, args.samples, args.max_tokens
        )
        beams.check()
    if bool(args.file) != bool(args.output):
        raise ConfigError(["--file and --output: give both, or neither"])
    if beams is not None and (args.file or args.interactive):
        raise ConfigError([f"--beams={args.beams}: goes with --prompt only"])
    if args.rows < 1:
        raise ConfigError([f"--rows={args.rows}: must be at least 1"])
    file = sample.File(args.file, args.output, settings) if args.file else None
    from gptjax import load

    prompts, precompile = args.prompt or [""], None
    if beams is None and not (args.file or args.interactive or args.bench):
        precompile = lambda sampler: sampler.precompile(prompts, settings)
    say = Progress().say
    with load.load_model(args.run, dtype=args.dtype, say=say, precompile=precompile) as model:
        if args.bench:
            from gptjax.cli import benchmark

            benchmark.report(model, print)
            return
        if model.tokenizer is None and file is None:
            raise DataError(f"{args.run}: its source had no tokenizer, so it cannot read a prompt")
        sampler = model.sampler(slots=args.rows)
        if file is not None:
            file.fill(sampler, Progress())
        elif args.interactive:
            sample.converse(sampler, settings)
        else:
            done = (
                sampler.generate(prompts, settings)
                if beams is None
                else sampler.beam(prompts, beams)
            )
            sample.show(done, prompts, sampler, as_json=args.json, many=args.samples > 1)


def _serve(args: argparse.Namespace, _: Sequence[str]) -> None:
    from dataclasses import fields

    from gptjax.serve import Options, serve

    chosen = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    serve(args.run, chosen, Progress().say)


def _plan(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from dataclasses import fields

    from gptjax.plan import hardware

    cfg = _resolve(args, overrides)
    hardware.environment()
    from gptjax.cli import plan

    chosen = {field.name: getattr(args, field.name) for field in fields(plan.Options)}
    plan.run(cfg, plan.Options(**chosen), print)


def _convert(args: argparse.Namespace, _: Sequence[str]) -> None:
    (kind, source), (into, target) = map(_kind_and_folder, (args.source, args.target))
    if kind == "run" == into and not pathlib.Path(source, config.CONFIG_FILE).exists():
        raise ConfigError([f"{source}: is no run folder; a Hugging Face folder is hf:{source}"])
    if kind == "run" == into and any(pathlib.Path(source).glob("*.safetensors")):
        raise ConfigError([f"{source}: is a Hugging Face folder; give hf:{source}"])
    if kind != "run" != into:
        what = f"convert {args.source} {args.target}"
        raise ConfigError([f"{what}: one of the two must be a run folder"])
    if into != "hf" and args.dtype:
        raise ConfigError([f"--dtype={args.dtype}: only of an export to hf:FOLDER"])
    if (kind == "peft") != (args.base is not None):
        raise ConfigError(["--base: the model that peft:FOLDER goes with, and only there"])
    from gptjax.cli import convert

    progress, compare = Progress(), not args.no_compare
    if kind == "hf":
        certificate = convert.import_run(source, target, progress, compare=compare)
    elif kind == "peft":
        certificate = convert.import_adapters(source, args.base, target, progress)
    elif into == "hf":
        certificate = convert.export_run(
            source, target, progress, dtype=args.dtype, compare=compare
        )
    elif into == "peft":
        certificate = convert.export_adapters(source, target, progress)
    else:
        certificate = convert.merge_run(source, target, progress)
    _print_certificate(certificate)


def _kind_and_folder(path: str) -> tuple[str, str]:
    kind, colon, folder = path.partition(":")
    return (kind, folder) if colon and kind in ("hf", "peft") else ("run", path)


def _print_certificate(certificate: dict[str, Any], indent: str = "") -> None:
    for name, value in certificate.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_certificate(value, f"{indent}  ")
        else:
            print(f"{indent}{name}: {value if not isinstance(value, float) else f'{value:.3g}'}")


def _inspect(args: argparse.Namespace, _: Sequence[str]) -> None:
    from gptjax.checkpoint import run_dir
    from gptjax.checkpoint.checkpointer import Checkpointer
    from gptjax.model import flops as counts

    cfg = config.load(args.run)
    steps = Checkpointer(pathlib.Path(args.run) / run_dir.CHECKPOINTS).steps()
    parameters = counts.parameters(cfg.model)
    print(f"{args.run}: {parameters.total:,} parameters, {parameters.active:,} active")
    print(f"checkpoints: {', '.join(map(str, steps)) or 'none'}")
    if source := run_dir.source_of(args.run):
        print(f"imported from {source['folder']}")
    if certificate := run_dir.certificate_of(args.run):
        _print_certificate(certificate)


def _data_prepare(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    cfg, progress, rates = _resolve(args, overrides), Progress(), []
    from gptjax.data import prepare

    with prepare.shown(progress) as tell:
        manifest = prepare.prepare(cfg, tell, progress.say, lambda *done: rates.append(done))
    print(json.dumps({"store": cfg.data.store, "tokenizer": manifest.tokenizer}))
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens"
        )
    print(", ".join(f"{name} {count}" for name, count in manifest.counts.items()))
    for size, seconds in rates:  # none where the store was found made
        print(
            f"{size / 1e6:.1f} MB of text tokenized in {seconds:.1f} s "
            f"({size / 1e6 / seconds:.1f} MB/s)"
        )


def _data_verify(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from gptjax.data import store

    cfg = _resolve(args, overrides)
    problems = list(store.verify(cfg.data.store))
    if problems:
        raise DataError("\n  ".join(problems))
    print(f"{cfg.data.store}: every chunk is what the manifest says")


def _data_show(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from etils import epath

    from gptjax import tokenizer as tokenizers
    from gptjax.data import loader, store

    cfg = _resolve(args, overrides)
    if args.step < 1:
        raise ConfigError([f"--step={args.step}: steps are counted from 1"])
    data = loader.TrainData.open(cfg, store.read_manifest(cfg.data.store))
    tokenizer = tokenizers.load(epath.Path(cfg.data.store))
    for window, tokens in zip(data.ids(args.step - 1), data.read(args.step - 1), strict=True):
        print(f"window {window}: {tokenizer.decode(tokens.tolist())!r}")


def _data_bench(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from gptjax.data import loader

    cfg = _resolve(args, overrides)
    rates = loader.bench(cfg, _prepare(cfg, Progress()), args.seconds)
    print(
        f"{cfg.train.batch} x {cfg.train.seq_len} tokens a batch: median {rates[1] / 1e6:.1f} "
        f"million tokens/s through tf.data (from {rates[0] / 1e6:.1f} to {rates[2] / 1e6:.1f})"
    )


def _tokenizer_train(args: argparse.Namespace, _: Sequence[str]) -> None:
    kind = next(
        kind for kind, names in config.validation.ALGORITHMS.items() if args.algorithm in names
    )
    cfg = config.Config(
        model=config.ModelConfig(vocab_size=max(args.vocab_size, 1)),
        tokenizer=config.TokenizerConfig(
            kind=kind,
            algorithm=args.algorithm,
            vocab_size=args.vocab_size,
            sample_bytes=args.sample_bytes,
        ),
        data=config.DataConfig(
            sources=tuple(args.source or ["python-library"]),
            text_field=args.text_field,
            valid_fraction=args.valid_fraction,
        ),
    )
    cfg.check()
    from gptjax.data import prepare, train_tokenizer

    with prepare.shown(Progress()) as tell:
        report = train_tokenizer.train(cfg, pathlib.Path(args.folder), tell)
    print(f"{args.folder}: {args.algorithm}, {report}")


def _tokenizer_show(args: argparse.Namespace, _: Sequence[str]) -> None:
    from etils import epath

    from gptjax import tokenizer as tokenizers

    tokenizer = tokenizers.load(epath.Path(args.folder))
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    named = ", ".join(
        f"{name} {token} {tokenizer.piece(token)!r}"
        for name, token in special.items()
        if token is not None
    )
    print(f"{tokenizer.kind}, {tokenizer.vocab_size:,} pieces, {named}")
    for token in tokenizer.encode(args.text):
        print(f"{token:8} {tokenizer.piece(token)!r}")


def _config(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    cfg = _resolve(args, overrides)
    if args.json:
        print(json.dumps(config.to_dict(cfg), indent=2))
        return
    if args.count:
        _print_counts(cfg)
        return
    origins = config.provenance(cfg, args.config, overrides)
    for name, value in config.flatten(cfg).items():
        print(f"{name:28} {value!r:32} {origins[name]}")


def _print_counts(cfg: config.Config) -> None:
    from gptjax.model import flops as counts

    parameters = counts.parameters(cfg.model)
    for name, number in parameters.parts.items():
        print(f"{name:28} {number:>20,}")
    print(f"{'total':28} {parameters.total:>20,}")
    print(f"{'active':28} {parameters.active:>20,}  of one token")
    flops = counts.flops_per_token(cfg.model, cfg.train.seq_len)
    print(
        f"{'training FLOPs':28} {flops:>20,.0f}  a token, in sequences of {cfg.train.seq_len} "
        "(forward: a third)"
    )
