"""Time one training step of several implementations, interleaved.

Every arm is a live child process that has built its model, compiled and warmed up. The driver
asks each arm in turn for one step, round after round, so that drifts of the machine (frequency,
other load) fall on all arms alike. Only one arm works at a time.

    python tests/bench/train_step.py --shape char
    python tests/bench/train_step.py --arms gptjax gptjax-glibc gptjax-scan gptjax-reference

    git clone https://github.com/karpathy/nanoGPT
    python3 -m venv torchenv && torchenv/bin/pip install torch numpy
    python tests/bench/train_step.py --shape gpt2v --dtype bfloat16 --rounds 15 \\
        --nanogpt nanoGPT --torch-python torchenv/bin/python --versus nanogpt-eager

A step is forward, backward, clipping the gradient's norm to 1.0 and an AdamW update (lr 3e-4,
betas 0.9 and 0.95, weight decay 0.1 on matrices), without biases or dropout, always on the same
random batch, up to having the loss as a Python float. All arms see the same tokens and take the
same number of steps, so their losses should stay near each other (their random weights differ).
gptjax computes the loss of a large vocabulary in chunks of 1024 tokens, nanoGPT in one piece.
With bfloat16 the nanoGPT arms keep float32 weights and use autocast. nanogpt-compile needs a C++
compiler. Threads are left at each library's default.

`ratio` is an arm's median over that of --versus, `cpu s` the median user+system seconds of one
step, `peak MiB` the largest resident size of the process so far, compilation included.
"""

import argparse
import contextlib
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any, NamedTuple

ARMS = ("gptjax", "nanogpt-eager", "nanogpt-compile")
# gptjax with one of its ideas taken out, to see what each gives.
WITHOUT = ("gptjax-glibc", "gptjax-scan", "gptjax-reference", "gptjax-autodiff", "gptjax-xent")
CHILD = "_child"  # hidden subcommand: _child ARM SHAPE DTYPE NANOGPT_DIR
WARMUP_STEPS = 3
SETTLE_SECONDS = 0.5  # lets the worker threads of the previous arm stop spinning

Step = Callable[[], float]


class Shape(NamedTuple):
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    vocab: int


SHAPES = {
    "char": Shape(layers=6, width=384, heads=6, context=256, batch=16, vocab=128),
    "gpt2v": Shape(layers=6, width=384, heads=6, context=256, batch=16, vocab=50304),
    "small": Shape(layers=12, width=768, heads=12, context=512, batch=2, vocab=50304),
}


def random_tokens(shape: Shape) -> Any:
    """The batch of every arm: int64 [batch, context + 1]; inputs [:, :-1], targets [:, 1:]."""
    np: Any = importlib.import_module("numpy")
    return np.random.default_rng(0).integers(0, shape.vocab, (shape.batch, shape.context + 1))


def build_gptjax_step(shape: Shape, dtype: str, without: str = "") -> tuple[Step, int]:
    """gptjax's own train step, unrolled, as `gptjax train` runs it on one CPU device.

    `without` takes one idea out: glibc (its malloc as it is), scan (layers in a loop), reference
    (attention), autodiff (of LayerNorm and GELU), xent (the loss from whole logits).
    """
    from gptjax.runtime import malloc

    if without != "glibc":
        malloc.keep_memory()  # before anything large is imported, as the command line does
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptjax.config import ComputeConfig, Config, ModelConfig, OptimConfig, TrainConfig
    from gptjax.model import decoder, feed_forward, layers
    from gptjax.parallel import arrays, mesh
    from gptjax.training import loss, objective
    from gptjax.training.step import create_state, train_step

    if without == "autodiff":

        def layer_norm(x, scale, bias, eps):
            x = x - x.mean(-1, keepdims=True)
            return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * scale

        layers.layer_norm, feed_forward.UNGATED["gelu_tanh"] = layer_norm, jax.nn.gelu
    if without == "xent":

        def cross_entropy(x, w, targets, weights, z_loss, chunks):
            logits = jnp.einsum("nd,vd->nv", x, w.astype(x.dtype)).astype(jnp.float32)
            hit = (logits * jax.nn.one_hot(targets, w.shape[0])).sum(-1)
            return (weights * (jax.nn.logsumexp(logits, -1) - hit)).sum(), jnp.float32(0)

        loss.cross_entropy = cross_entropy

    tokens = shape.batch * shape.context
    cfg = Config(
        model=ModelConfig(
            vocab_size=shape.vocab,
            context=shape.context,
            layers=shape.layers,
            embed=shape.width,
            heads=shape.heads,
            linear_bias=False,
            norm_bias=False,
        ),
        compute=ComputeConfig(
            dtype=dtype,
            scan_layers=without == "scan",
            attention="reference" if without == "reference" else "auto",
            loss_chunks=max(tokens // 1024, 1) if shape.vocab > 4096 else 1,
        ),
        optim=OptimConfig(lr=3e-4, lr_schedule="constant"),
        train=TrainConfig(seq_len=shape.context, batch_tokens=tokens, tokens=tokens * 1000),
    )
    jax.set_mesh(mesh.make_mesh(cfg.mesh))
    loss_fn = lambda params, batch, key: objective.next_token_loss(params, cfg, batch, 0, key)
    state = jax.jit(lambda: create_state(cfg, lambda key: decoder.init(cfg.model, key)))()
    step_fn = jax.jit(lambda s, b: train_step(cfg, loss_fn, s, b), donate_argnums=0)
    batch = {
        "windows_BW": arrays.global_batch(random_tokens(shape).astype(np.int32), shape.batch),
        "lengths_B": arrays.global_batch(
            np.full(shape.batch, shape.context, np.int32), shape.batch
        ),
    }

    def step() -> float:
        nonlocal state
        state, metrics = step_fn(state, batch)
        return float(jax.block_until_ready((metrics, state))[0]["loss"])

    return step, tokens


def build_nanogpt_step(shape: Shape, dtype: str, checkout: str, compiled: bool) -> tuple[Step, int]:
    sys.path.insert(0, checkout)
    torch: Any = importlib.import_module("torch")
    nanogpt: Any = importlib.import_module("model")
    torch.manual_seed(0)
    sizes = {"block_size": shape.context, "vocab_size": shape.vocab, "n_layer": shape.layers}
    sizes |= {"n_head": shape.heads, "n_embd": shape.width}
    model = nanogpt.GPT(nanogpt.GPTConfig(**sizes, dropout=0.0, bias=False)).train()
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "cpu")
    forward = torch.compile(model) if compiled else model
    tokens = torch.from_numpy(random_tokens(shape))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    autocast = torch.amp.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> float:
        with autocast:
            _, loss = forward(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step, targets.numel()


def serve(step: Step, tokens: int, replies: IO[str]) -> None:
    """Warm up, print `ready {json}`; then for each line `step` on stdin run one, print json."""
    first_loss, *_ = [step() for _ in range(WARMUP_STEPS)]
    print("ready", json.dumps({"tokens": tokens, "first_loss": first_loss}), file=replies)
    for line in sys.stdin:
        if line.strip() != "step":
            raise SystemExit(f"unknown request: {line!r}")
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        loss = step()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        peak = after.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        reply = {"seconds": seconds, "cpu": cpu, "loss": loss, "peak_mib": peak}
        print(json.dumps(reply), file=replies)


def child(arm: str, shape: str, dtype: str, checkout: str) -> None:
    # What libraries print must not reach the driver: keep stdout for replies, give them stderr.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if arm.startswith("gptjax"):
        serve(*build_gptjax_step(SHAPES[shape], dtype, arm.partition("-")[2]), replies)
    else:
        compiled = arm == "nanogpt-compile"
        serve(*build_nanogpt_step(SHAPES[shape], dtype, checkout, compiled), replies)


def ask(arm: str, process: "subprocess.Popen[str]", request: str = "") -> Any:
    """Send a request, if any, and read one line of reply."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(request)
    if not (line := process.stdout.readline()):
        raise SystemExit(f"{arm}: the child exited with status {process.wait()}")
    return json.loads(line.removeprefix("ready "))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="char")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--nanogpt", metavar="DIR", default="", help="a checkout of nanoGPT")
    parser.add_argument("--torch-python", metavar="PATH", help="an interpreter that has torch")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS + WITHOUT, help="default: gptjax, and nanoGPT if given"
    )
    parser.add_argument("--versus", help="the arm ratios refer to (default: the first)")
    args = parser.parse_args()
    args.arms = args.arms or (ARMS if args.nanogpt else ARMS[:1])
    args.versus = args.versus or args.arms[0]
    if args.versus not in args.arms or args.rounds < 1:
        parser.error("--versus must be one of the arms, --rounds at least 1")
    nanogpt = any(arm.startswith("nanogpt") for arm in args.arms)
    if nanogpt and not (args.nanogpt and args.torch_python):
        parser.error("the nanogpt arms need --nanogpt and --torch-python")
    return args


def main() -> None:
    args = parse_args()
    steps: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
    tokens = 0
    with contextlib.ExitStack() as stack:  # leaving it closes the children's stdin and waits
        children = {}
        for arm in steps:  # one after the other: compiling would slow the others down
            python = args.torch_python if arm.startswith("nanogpt") else sys.executable
            command = [python, __file__, CHILD, arm, args.shape, args.dtype, args.nanogpt]
            pipe, start = subprocess.PIPE, time.perf_counter()
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)
            children[arm] = stack.enter_context(process)
            ready = ask(arm, process)
            tokens, warm = ready["tokens"], time.perf_counter() - start
            print(f"{arm}: warm in {warm:.1f} s, first loss {ready['first_loss']:.4f}", flush=True)
        for _ in range(args.rounds):
            for arm, process in children.items():
                time.sleep(SETTLE_SECONDS)
                steps[arm].append(ask(arm, process, "step\n"))
    reference = statistics.median(step["seconds"] for step in steps[args.versus])
    print(f"{args.shape} {args.dtype}, {tokens} tokens a step, {args.rounds} rounds")
    print(f"{'arm':16} median s    min s  ratio  tokens/s    cpu s  peak MiB  last loss")
    for arm, taken in steps.items():
        seconds, last = [step["seconds"] for step in taken], taken[-1]
        median, cpu = statistics.median(seconds), statistics.median(step["cpu"] for step in taken)
        print(
            f"{arm:16} {median:8.4f} {min(seconds):8.4f} {median / reference:6.3f} "
            f"{tokens / median:9.0f} {cpu:8.3f} {last['peak_mib']:9.0f} {last['loss']:10.4f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        child(*sys.argv[2:])
    else:
        main()
