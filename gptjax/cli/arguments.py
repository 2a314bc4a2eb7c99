"""The arguments of each subcommand, each a function on its argparse parser.

Imports nothing heavy: help and a wrong flag cost no import of jax or TensorFlow.
"""

import argparse
from collections.abc import Sequence

from gptjax import config as configs

CONFIG_HELP = (
    "a preset (`gptjax presets` lists them; or a file of yours, mine.py:main), a JSON file, or a "
    "run folder; then overrides such as --optim.lr 3e-4 (`gptjax config CONFIG --help` lists them)"
)


def resolve(args: argparse.Namespace, overrides: Sequence[str]) -> configs.Config:
    """The checked configuration of a command with overrides. Raises ConfigError."""
    prog, text = args.subparser.prog, args.subparser.format_help()
    cfg = configs.resolve(args.config, overrides, prog, text)
    if cfg.start.base:
        from gptjax.pretrain import warm_start

        cfg = warm_start.with_base(cfg, args.config, overrides, prog, text)
    cfg.check()
    args.resolved = cfg
    return cfg


def config(parser: argparse.ArgumentParser) -> None:
    """CONFIG alone."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=CONFIG_HELP)


def run_folder(parser: argparse.ArgumentParser) -> None:
    """RUN alone."""
    parser.add_argument("run", metavar="RUN", help="a run folder")


def report(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax report`."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument("--html", metavar="FILE", help="write a page, which needs no other file")


def verify(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax verify`."""
    config(parser)
    parser.add_argument(
        "--from",
        dest="first",
        type=int,
        metavar="STEP",
        help="of a run: the checkpoint to begin with, or 0 (that before the newest)",
    )
    parser.add_argument("--steps", type=int, help="of a run: how many (up to the next checkpoint)")
    parser.add_argument(
        "--meshes",
        action="store_true",
        help="of a CONFIG: losses on eight virtual devices along every axis, beside those of one",
    )


def replay(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax replay`."""
    run_folder(parser)
    parser.add_argument("--step", type=int, required=True, help="the step, counted from 1")
    parser.add_argument(
        "--files", action="store_true", help="find the files of the documents, in the text itself"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page, with all of the texts")


def show_config(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax config`."""
    config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, itself a valid CONFIG")
    parser.add_argument(
        "--count", action="store_true", help="print parameters and FLOPs instead; allocates nothing"
    )


def data_show(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax data show`."""
    config(parser)
    parser.add_argument("--step", type=int, default=1, help="the step whose batch to show (1)")


def data_bench(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax data bench`."""
    config(parser)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure (5)")


def data_import(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax data import`."""
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        metavar="FILE",
        help="token files or folders of them: nanoGPT's or llm.c's .bin, Megatron's .bin with its "
        ".idx, OLMo's or NumPy's .npy",
    )
    add(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="the tokenizer that made them: a file or folder, or bytes",
    )
    add("--store", required=True, metavar="FOLDER", help="the new token store")
    add("--valid", nargs="+", metavar="FILE", help="token files of the validation text")
    add(
        "--valid-fraction",
        type=float,
        default=0.02,
        metavar="F",
        help="without --valid, the fraction of documents that is held out (0.02)",
    )
    add(
        "--dtype",
        choices=["uint16", "uint32"],
        default="",
        help="type of tokens in files that do not say it (the narrower one for the vocabulary)",
    )


def tokenizer_show(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax tokenizer show`."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder that holds a tokenizer")
    parser.add_argument("--text", required=True, help="the text, taken as a document")


def convert(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax convert`."""
    add = parser.add_argument
    add("source", metavar="FROM", help="a run folder, hf:FOLDER or peft:FOLDER")
    add("target", metavar="TO", help="a new run folder, hf:FOLDER or peft:FOLDER")
    add("--base", metavar="RUN", help="for peft:FOLDER: the run or hf:FOLDER that it adapts")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="element type of exported tensors (an imported run's own, otherwise float32)",
    )
    add("--no-compare", action="store_true", help="do not compare with transformers")


def sample(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax sample`."""
    parser.add_argument("run", metavar="RUN|HF_DIR", help="a run folder, or a Hugging Face folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated"
    )
    source.add_argument(
        "--file",
        metavar="JSONL",
        help='objects with "prompt" and, each if wanted, settings by their names below, such as '
        '"temperature"; results go to --output as they come',
    )
    source.add_argument(
        "--interactive", action="store_true", help="ask for prompts, and stream continuations"
    )
    source.add_argument(
        "--bench", action="store_true", help="measure prefill and decoding at batch 1, 8 and 32"
    )
    parser.add_argument(
        "--output", metavar="JSONL", help="of --file; lines that it has already are not done again"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of weights and cache (the run's own)"
    )
    parser.add_argument("--rows", type=int, default=32, help="samples that decode at a time (32)")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    _add_settings(parser)
    parser.add_argument("--beams", type=int, default=0, metavar="N", help="beam search instead")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="of beams (1)")
    parser.add_argument(
        "--early-stopping", choices=["false", "true", "never"], default="false", help="of beams"
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax eval`: the fields of `cli.eval.Options`, and the run."""
    kinds = ", ".join(configs.validation.TASK_KINDS)
    parser.add_argument("run", metavar="RUN|HF_DIR", help="a run folder, or a Hugging Face folder")
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="text files, .jsonl, .parquet, folders, quoted globs, tfds:NAME, instead of the run's "
        "own validation text; each document is predicted from its own beginning",
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="KIND:FILE",
        help=f"a file of questions in its published format; may be repeated; kinds: {kinds}",
    )
    parser.add_argument(
        "--text-field", default="text", help="field of records with the text (text)"
    )
    parser.add_argument(
        "--length",
        type=int,
        default=0,
        metavar="N",
        help="tokens that the model reads at a time, of text (train.seq_len; of a Hugging Face "
        "folder its context, up to 1024)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a document from window to window; fewer give each more context (--length)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="the first N documents and examples only"
    )
    parser.add_argument(
        "--batch", type=int, default=0, metavar="N", help="rows of a batch (eval.batch)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="to compute in (the run's own)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the intervals' resamples (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def finetune(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax finetune`."""
    parser.add_argument(
        "config",
        metavar="RUN|hf:FOLDER",
        nargs="?",
        help="whose parameters to begin from; then overrides such as --run OUT, --optim.lr 3e-5, "
        "--finetune.epochs 5 (`gptjax finetune RUN --help` lists them all)",
    )
    parser.add_argument(
        "--task",
        choices=["classify", "choose", "answer"],
        help="classify: a label of a text or a pair; choose: the right one of several choices; "
        "answer: in words",
    )
    parser.add_argument(
        "--data",
        metavar="JSONL",
        help='objects with "text", perhaps "pair", and "label"; to choose: "text", "choices" and '
        'the number of the right one, from 0, as "label"; to answer: "prompt" and "answer", or '
        '"messages" of a conversation, or a file of SQuAD, FILE.json',
    )
    parser.add_argument("--valid", metavar="JSONL", help="the same, to measure on")


def predict(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax predict`."""
    parser.add_argument("run", metavar="RUN", help="a run of `gptjax finetune`")
    parser.add_argument(
        "--file", metavar="JSONL", required=True, help="objects as for finetune, labels left out"
    )
    parser.add_argument(
        "--output", metavar="JSONL", required=True, help="for labels and their probabilities"
    )


def serve(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax serve`: the fields of `serve.Options`, and the run."""
    parser.add_argument("run", metavar="RUN|HF_DIR", help="a run folder, or a Hugging Face folder")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; one that others can reach needs a token (127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=8000, help="0 is one that is free (8000)")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="a file with the token that requests must carry (that in GPTJAX_TOKEN, if any)",
    )
    parser.add_argument("--name", help="the model's, in requests (that of its folder)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of weights and cache (the run's own)"
    )
    parser.add_argument("--rows", type=int, default=8, help="samples that decode at a time (8)")
    parser.add_argument(
        "--queue", type=int, default=64, help="samples that wait for a row, at most (64)"
    )
    parser.add_argument(
        "--max-tokens-limit",
        type=int,
        metavar="N",
        help="tokens of a prompt and its continuation, at most (2048, or the model's context)",
    )
    parser.add_argument(
        "--max-body", type=int, default=1 << 20, metavar="BYTES", help="of a request (1048576)"
    )


def plan(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax plan`: CONFIG, and the fields of `cli.plan.Options`."""
    config(parser)
    parser.add_argument(
        "--machine",
        metavar="NAME",
        help="such as v5e:16x16, 2xv5p:8x8x8 (two slices) or h100:64 (that of mesh.machine)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the step for the machine, too, and show what the compiler says; a minute",
    )
    parser.add_argument(
        "--sampling", action="store_true", help="compile the sampling module's programs, too"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try every mesh, remat policy and accumulation; with --compile, the best two",
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with pictures, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--price", type=float, default=0.0, help="of a chip for an hour, your figure"
    )
    parser.add_argument(
        "--storage",
        type=float,
        default=0.0,
        metavar="GB/S",
        help="what the storage of checkpoints takes from all processes together, your figure",
    )
    parser.add_argument(
        "--failures",
        type=float,
        default=0.0,
        metavar="N",
        help="failures of the job a day, your figure: how often to save (with --storage)",
    )


def tokenizer_train(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gptjax tokenizer train`."""
    parser.add_argument("folder", metavar="FOLDER", help="where to save it, for --tokenizer.path")
    parser.add_argument(
        "--source",
        action="append",
        metavar="PATTERN",
        help="files, a quoted glob, tfds:NAME; may be repeated (python-library)",
    )
    parser.add_argument(
        "--algorithm",
        choices=[name for names in configs.ALGORITHMS.values() for name in names],
        default="bpe",
        help="bpe and unigram are SentencePiece's, the others Hugging Face's (bpe)",
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces to train (4096)")
    parser.add_argument(
        "--sample-bytes", type=int, default=10_000_000, help="text to train on (10000000)"
    )
    parser.add_argument(
        "--text-field", default="text", help="field of records with the text (text)"
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.02, help="share of documents held out (0.02)"
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that are fields of `sample.SamplingParams`, under the same names."""
    add = parser.add_argument
    add("--max-tokens", type=int, default=128, help="longest continuation (128)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (0.8)")
    add("--top-k", type=int, default=0, help="keep the k likeliest; 0: all (0)")
    add("--top-p", type=float, default=0.95, help="nucleus; 1: all (0.95)")
    add("--min-p", type=float, default=0.0, help="least share of the likeliest's chance (0)")
    add("--repetition-penalty", type=float, default=1.0, help="of tokens seen; 1: none (1)")
    add("--presence-penalty", type=float, default=0.0, help="of tokens drawn before (0)")
    add("--frequency-penalty", type=float, default=0.0, help="for each time drawn before (0)")
    add(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=BIAS",
        help="added to a token's logit; may be repeated",
    )
    add("--ban", type=int, action="append", default=[], metavar="ID", help="a token never drawn")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a continuation")
    add("--samples", type=int, default=1, help="continuations of each prompt (1)")
    add("--seed", type=int, default=0, help="same seed, same samples (0)")
    add(
        "--logprobs",
        type=int,
        metavar="N",
        help="log-probability of each token, and of the N likeliest in its place",
    )


def _bias(text: str) -> tuple[int, float]:
    try:
        token, bias = text.split("=")
        return int(token), float(bias)
    except ValueError:
        what = f"{text!r} must be a token's number and a bias, such as 50=-2"
        raise argparse.ArgumentTypeError(what) from None
