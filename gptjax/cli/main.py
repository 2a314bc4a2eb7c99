"""The `gptjax` command: its subcommands, their dispatch, and how an error is told.

Each subcommand is a function in a module of its own, imported when it runs: `--help` and a wrong
flag cost no import of jax or TensorFlow.
"""

import argparse
import gc
import importlib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptjax.cli import arguments
from gptjax.cli.failures import as_gptjax_error
from gptjax.config.limits import unusable
from gptjax.errors import ConfigError, GptjaxError, OutputError, PeerError, Preempted
from gptjax.runtime import malloc
from gptjax.version import __version__

_LONGEST_WORD, _LONGEST_MESSAGE = 300, 1900  # characters
_PATHS = (
    "config",
    "run",
    "folder",
    "source",
    "target",
    "base",
    "file",
    "output",
    "data",
    "valid",
    "files",
)


@dataclass(frozen=True)
class Command:
    """A subcommand; `handler` is module:function below gptjax.cli, called with (arguments, rest).

    One with `overrides` takes a CONFIG and then fields of the configuration, which tyro parses.
    """

    name: str
    handler: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    overrides: bool = False
    trains: bool = False
    before_import: Callable[[], None] = lambda: None

    def add_to(self, commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        """Adds its parser; with overrides, tyro answers --help after CONFIG."""
        parser = commands.add_parser(
            self.name,
            help=self.help,
            description=self.help,
            add_help=not self.overrides,
            allow_abbrev=not self.overrides,
        )
        parser.set_defaults(command=self, subparser=parser)
        self.add_arguments(parser)

    def run(self, args: argparse.Namespace, rest: Sequence[str]) -> None:
        """Imports its module and runs it."""
        self.before_import()
        module, function = self.handler.split(":")
        getattr(importlib.import_module(f"gptjax.cli.{module}"), function)(args, rest)


def _plan_anywhere() -> None:
    """Sets what JAX must find in the environment, to plan on a machine without accelerators."""
    from gptjax.plan import machines

    machines.set_environment()


COMMANDS = (
    Command(
        "train",
        "train:run",
        "Train CONFIG in its run folder, from where it stands; prepares the data if need be.",
        arguments.config,
        overrides=True,
        trains=True,
    ),
    Command(
        "finetune",
        "finetune:run",
        "Fine-tune the model of RUN, or of a Hugging Face folder, on labelled examples or "
        "conversations; in a run folder of its own, from where that stands.",
        arguments.finetune,
        overrides=True,
        trains=True,
    ),
    Command(
        "predict",
        "predict:run",
        "Label the lines of a file by a fine-tuned run, with probabilities.",
        arguments.predict,
    ),
    Command(
        "eval",
        "eval:run",
        "Measure loss and bits per byte of a run on its validation text, or of a run or a Hugging "
        "Face folder on any text; and its results on tasks.",
        arguments.evaluate,
    ),
    Command(
        "sample",
        "sample:run",
        "Continue prompts, lines of a file, or what is typed, with the model of a run or of a "
        "Hugging Face folder.",
        arguments.sample,
    ),
    Command(
        "serve",
        "serve:run",
        "Serve the model of a run or of a Hugging Face folder over HTTP: the completions interface "
        "that clients know, and a page to try it on.",
        arguments.serve,
    ),
    Command(
        "plan",
        "plan:run_command",
        "Predict whether and how a training run of CONFIG fits a machine, and what it costs; "
        "needs no accelerator.",
        arguments.plan,
        overrides=True,
        before_import=_plan_anywhere,
    ),
    Command(
        "convert",
        "convert:run",
        "Make a run of a Hugging Face folder, or the reverse: convert hf:FOLDER RUN, or RUN "
        "hf:FOLDER. Compares the logits with those of transformers where it is installed. "
        "peft:FOLDER is a run's adapters alone, in PEFT's layout; of a run with adapters, another "
        "RUN is the one in which they are merged.",
        arguments.convert,
    ),
    Command(
        "inspect",
        "inspect:run",
        "Show how far a run is, its model and checkpoints, and where it comes from.",
        arguments.run_folder,
    ),
    Command(
        "fsck",
        "fsck:run",
        "Read all of a run's checkpoints and tokens, and tell what is damaged or left over.",
        arguments.run_folder,
    ),
    Command(
        "report",
        "report:run",
        "Show how runs went, and what their time was spent on; as a page with --html.",
        arguments.report,
    ),
    Command(
        "verify",
        "verify:run",
        "Train a part of a run again, and tell whether it has the bits that were saved. Of a "
        "CONFIG: kill and resume a tiny copy of it, or train that on every mesh.",
        arguments.verify,
        overrides=True,
    ),
    Command(
        "replay",
        "replay:run",
        "Train a step of RUN again: its documents, and what each of them did to loss and gradient.",
        arguments.replay,
    ),
    Command(
        "config",
        "show_config:run",
        "Print CONFIG resolved, and where each value came from.",
        arguments.show_config,
        overrides=True,
    ),
    Command("presets", "presets:run", "List the configurations that come with gptjax."),
)
GROUPS: dict[str, tuple[str, tuple[Command, ...]]] = {
    "data": (
        "Prepare and inspect training data.",
        (
            Command(
                "prepare",
                "data:prepare",
                "Train or load the tokenizer and tokenize CONFIG's text into its store.",
                arguments.config,
                overrides=True,
            ),
            Command(
                "import",
                "data:import_files",
                "Make a token store of files of tokens that other trainers wrote.",
                arguments.data_import,
            ),
            Command(
                "verify",
                "data:verify",
                "Hash CONFIG's store against its manifest.",
                arguments.config,
                overrides=True,
            ),
            Command(
                "show",
                "data:show",
                "Print the training batch of a step.",
                arguments.data_show,
                overrides=True,
            ),
            Command(
                "bench",
                "data:bench",
                "Measure tokens a second through the input pipeline.",
                arguments.data_bench,
                overrides=True,
            ),
        ),
    ),
    "tokenizer": (
        "Train and inspect tokenizers.",
        (
            Command(
                "train",
                "tokenizer:train",
                "Train a tokenizer on text, and measure its compression of held-out documents.",
                arguments.tokenizer_train,
            ),
            Command(
                "show", "tokenizer:show", "Print the tokens of a text.", arguments.tokenizer_show
            ),
        ),
    ),
}


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = argparse.ArgumentParser(
        prog="gptjax", description="Generative pre-training in JAX: data, training, samples."
    )
    whole.add_argument("--version", action="version", version=f"gptjax {__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    for name, (text, members) in GROUPS.items():
        actions = commands.add_parser(name, help=text, description=text).add_subparsers(
            required=True, metavar="ACTION"
        )
        for member in members:
            member.add_to(actions)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. A GptjaxError is told in a sentence, no traceback."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for word in argv:
        if why := unusable(word):
            print(f"gptjax: argument {_shortened(repr(word))}: {why}", file=sys.stderr)
            return ConfigError.exit_code
    args, rest = _parse(argv)
    for name in _PATHS:
        given = getattr(args, name, None)
        if given == "" or (isinstance(given, list) and "" in given):
            print(f"gptjax: {name} is empty: give a file or a folder", file=sys.stderr)
            return ConfigError.exit_code
    malloc.keep_memory()
    gc.set_threshold(100_000)  # imports and traces stay: looking through them often takes 0.2 s
    try:
        args.command.run(args, rest)
        return 0
    except GptjaxError as error:
        return _tell(args, argv, error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("gptjax: interrupted", file=sys.stderr)
        _leave_job(130, "it was interrupted")
        return 130
    except Exception as error:
        if known := as_gptjax_error(error, getattr(args, "resolved", None), argv):
            return _tell(args, argv, known)
        # A defect: the other processes must not wait for this one.
        if "gptjax.runtime.distributed" in sys.modules:
            traceback.print_exc()
            _leave_job(1, f"{type(error).__name__}: {error}"[:500])
        raise


def _tell(args: argparse.Namespace, argv: Sequence[str], error: GptjaxError) -> int:
    """Prints an error in a sentence, tells the other processes, returns the exit code."""
    told = f"{error}{_how_to_continue(args, argv, error)}"
    print(f"gptjax: {_shortened(told)}", file=sys.stderr)
    if not (isinstance(error, Preempted) and not error.alone):  # else all end at the same step
        _leave_job(error.exit_code, str(error))
    return error.exit_code


def _shortened(message: str) -> str:
    """A message that a person can read, whatever is named in it."""
    message = re.sub(
        rf"\S{{{_LONGEST_WORD},}}", lambda word: f"{word[0][:80]}…{word[0][-40:]}", message
    )
    if len(message) <= _LONGEST_MESSAGE:
        return message
    half = _LONGEST_MESSAGE // 2
    return f"{message[:half]} […] {message[-half:]}"


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the rest that is left to the command. Exits where they are wrong."""
    whole = parser()
    args, rest = whole.parse_known_args(argv)
    if not args.command.overrides:
        if rest:
            whole.error(f"unrecognized arguments: {' '.join(rest)}")
    elif args.config is None:
        if {"-h", "--help"} & set(rest):
            args.subparser.print_help()
            sys.exit(0)
        args.subparser.error("the following arguments are required: CONFIG")
    return args, rest


def _leave_job(code: int, why: str) -> None:
    """Ends this process of a job of several, and tells the others."""
    if "gptjax.runtime.distributed" in sys.modules:  # otherwise it has joined no job
        from gptjax.runtime import distributed

        distributed.leave(code, f"{distributed.name()} has ended: {why}")


def _how_to_continue(args: argparse.Namespace, argv: Sequence[str], error: GptjaxError) -> str:
    """For a training run that ended early: what is safe, and how to continue."""
    cfg = getattr(args, "resolved", None)
    if not args.command.trains or cfg is None or isinstance(error, ConfigError):
        return ""
    again = isinstance(error, (Preempted, PeerError, OutputError))  # others would only come again
    from gptjax.checkpoint.checkpointer import Checkpointer
    from gptjax.checkpoint.run_dir import CHECKPOINTS
    from gptjax.runtime import distributed

    if not distributed.first():
        return ""
    from gptjax import bucket

    folder = bucket.path_of(cfg.run) / CHECKPOINTS
    try:
        steps = Checkpointer(folder).steps()
    except (OSError, GptjaxError):
        return ""
    safe = f"last committed step {steps[-1]} in {folder}" if steps else f"no checkpoint in {folder}"
    if not steps and not again:
        return ""
    return f"; {safe}" + (f"; to continue: gptjax {shlex.join(argv)}" if again else "")
