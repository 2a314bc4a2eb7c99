"""Tokens a second of several samplers on the same weights, interleaved.

    python tests/reference/fetch_smollm2.py smollm2
    python tests/bench/sampling.py --model smollm2 --dtype float32
    python tests/bench/sampling.py --model gpt2 --arms gptjax transformers

    python3 -m venv other && other/bin/pip install torch transformers llama-cpp-python
    python tests/bench/sampling.py --model smollm2 --other other/bin/python --gguf smollm2-f32.gguf

Every arm is a live child process that has loaded its model; the driver asks each in turn for one
round, so drifts of the machine fall on all alike. A round is `batch` prompts of 64 random tokens,
each continued greedily by 128, stop tokens off. `decode` counts the tokens after the first of each
row by the time since then; `first` is the time until those. Medians, and least to most.

`--model gpt2` is GPT-2 124M with random weights, anything else a Hugging Face folder. llama.cpp
reads the GGUF file, which should be in the same number format; it decodes a batch as that many
sequences of one context. Threads are each library's default, of llama.cpp the number of cores.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

PROMPT, NEW = 64, 128
Round = Callable[[int], tuple[float, float]]  # batch to seconds of the first tokens, of the rest


def gptjax_arm(model: str, dtype: str) -> Round:
    from gptjax.runtime import malloc

    malloc.keep_memory()
    from gptjax import load_model
    from gptjax.cli import benchmark

    mesh = contextlib.ExitStack()
    sampler = mesh.enter_context(load_model.load_model(model, dtype=dtype)).sampler()

    def round_of(batch: int, _entered: contextlib.ExitStack = mesh) -> tuple[float, float]:
        rate = benchmark.measure(sampler, batch, PROMPT, NEW)
        return rate.first, batch * (NEW - 1) / rate.decode

    return round_of


def transformers_arm(model: str, dtype: str) -> Round:
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    theirs.generation_config.eos_token_id = None
    generate = lambda ids, new: theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
    )

    def round_of(batch: int) -> tuple[float, float]:
        ids = torch.randint(0, theirs.config.vocab_size, (batch, PROMPT))
        start = time.perf_counter()
        generate(ids, 1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        generate(ids, NEW)
        return first, time.perf_counter() - start - first

    return round_of


def llama_arm(gguf: str) -> Round:
    import ctypes
    import os

    import llama_cpp
    import numpy as np

    silent = llama_cpp.llama_log_callback(lambda *_: None)  # must live as long as the library
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        gguf.encode(), llama_cpp.llama_model_default_params()
    )
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def round_of(batch: int, _silent: object = silent) -> tuple[float, float]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch * 256
        params.n_seq_max = batch
        params.n_batch = params.n_ubatch = batch * PROMPT
        params.n_threads = params.n_threads_batch = os.cpu_count()
        context = llama_cpp.llama_init_from_model(model, params)
        tokens = llama_cpp.llama_batch_init(batch * PROMPT, 0, 1)

        def decode(rows: np.ndarray, first: int) -> np.ndarray:
            tokens.n_tokens = rows.size
            for i, token in enumerate(rows.reshape(-1)):
                row, at = divmod(i, rows.shape[1])
                tokens.token[i], tokens.pos[i] = int(token), first + at
                tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, row
                tokens.logits[i] = at == rows.shape[1] - 1
            assert llama_cpp.llama_decode(context, tokens) == 0
            ends = [row * rows.shape[1] + rows.shape[1] - 1 for row in range(len(rows))]
            return np.array(
                [
                    np.ctypeslib.as_array(
                        llama_cpp.llama_get_logits_ith(context, i), (vocabulary,)
                    ).argmax()
                    for i in ends
                ]
            )[:, None]

        rows = np.random.default_rng(0).integers(0, vocabulary, (batch, PROMPT))
        start = time.perf_counter()
        last = decode(rows, 0)
        first = time.perf_counter() - start
        start = time.perf_counter()
        for step in range(NEW - 1):
            last = decode(last, PROMPT + step)
        rest = time.perf_counter() - start
        llama_cpp.llama_batch_free(tokens)
        llama_cpp.llama_free(context)
        return first, rest

    return round_of


def random_gpt2(folder: str) -> None:
    """Writes GPT-2 124M with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)


def child(arm: str, model: str, dtype: str) -> None:
    """Answers each batch size on stdin with the times of a round."""
    replies = sys.stdout
    sys.stdout = sys.stderr
    arms = {"gptjax": gptjax_arm, "transformers": transformers_arm}
    round_of = llama_arm(model) if arm == "llama.cpp" else arms[arm](model, dtype)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(round_of(int(line))), file=replies, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="gpt2, or a Hugging Face folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--gguf", help="for llama.cpp: the same weights in its format")
    parser.add_argument("--arms", nargs="+", default=["gptjax", "transformers"])
    parser.add_argument("--other", default=sys.executable, help="a Python that has the others")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["_child"]:
        return child(*sys.argv[2:])
    args = parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if model == "gpt2":
            model = scratch
            code = f"import sampling; sampling.random_gpt2({scratch!r})"
            subprocess.run([args.other, "-c", code], check=True, cwd=__file__.rpartition("/")[0])
        arms = args.arms + (["llama.cpp"] if args.gguf else [])
        processes = {}
        for arm in arms:
            python = sys.executable if arm == "gptjax" else args.other
            source = args.gguf if arm == "llama.cpp" else model
            processes[arm] = subprocess.Popen(
                [python, __file__, "_child", arm, source, args.dtype],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        try:
            measure(args, processes)
        finally:
            for process in processes.values():
                process.kill()


def ask(arm: str, process: "subprocess.Popen[str]", request: str = "") -> str:
    if request:
        process.stdin.write(request)
        process.stdin.flush()
    if not (reply := process.stdout.readline()):
        sys.exit(f"{arm}: ended; run it alone to see why: {' '.join(process.args)}")
    return reply


def measure(args: argparse.Namespace, processes: "dict[str, subprocess.Popen[str]]") -> None:
    for arm, process in processes.items():
        ask(arm, process)
    print(f"{args.model}, {args.dtype}, prompt {PROMPT}, new {NEW}, {args.rounds} rounds in turn")
    for batch in args.batches:
        times = {arm: [] for arm in processes}
        for number in range(args.rounds + 1):  # the first compiles
            for arm, process in processes.items():
                reply = json.loads(ask(arm, process, f"{batch}\n"))
                if number:
                    times[arm].append(reply)
        own = statistics.median(rest for _, rest in times["gptjax"]) if "gptjax" in times else None
        for arm, pairs in times.items():
            rates = sorted(batch * (NEW - 1) / rest for _, rest in pairs)
            rate = statistics.median(rates)
            first = statistics.median(first for first, _ in pairs)
            ratio = f", gptjax / this {batch * (NEW - 1) / own / rate:.2f}" if own else ""
            print(
                f"batch {batch:2} {arm:12} decode {rate:7.1f} tokens/s "
                f"({rates[0]:.1f} to {rates[-1]:.1f}), first {1e3 * first:6.0f} ms{ratio}",
                flush=True,
            )


if __name__ == "__main__":
    main()
