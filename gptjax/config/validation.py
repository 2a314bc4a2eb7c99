"""Whether the values of a configuration go together, and fit so many devices and processes.

Every problem is told at once, each as `dotted.field=value: what is wrong and what to do`. `cfg` is
a Config, whose file imports this one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptjax.config.registry import ATTENTION_BACKENDS, METRIC_WRITERS, OPTIMIZERS


def _name_problems(cfg: Any) -> Iterator[str]:
    """Names that stand for nothing registered."""
    if cfg.optim.name not in OPTIMIZERS.names():
        yield OPTIMIZERS.unknown(cfg.optim.name)
    if cfg.compute.attention not in ("auto", *ATTENTION_BACKENDS.names()):
        yield ATTENTION_BACKENDS.unknown(cfg.compute.attention)
    for name in cfg.log.writers:
        if name not in METRIC_WRITERS.names():
            yield METRIC_WRITERS.unknown(name)


def divisors(n: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _divides(part: int, whole: int) -> bool:
    """Whether it does; a part below one is a problem told elsewhere, and none here."""
    return part < 1 or whole % part == 0


def _nearest_multiples(n: int, of: int) -> str:
    """The legal values around n, in words."""
    below, above = n // of * of, -(-n // of) * of
    return str(above) if below == 0 else f"{below} or {above}"


_MODEL_SIZES = ("vocab_size", "vocab_multiple", "context", "layers", "embed")


def value_problems(cfg: Any) -> Iterator[str]:
    """Every value that is out of its range, or does not go with another."""
    m, t, o = cfg.model, cfg.train, cfg.optim
    yield from model_problems(m)
    at_least_one = {
        "compute.loss_chunks": cfg.compute.loss_chunks,
        "compute.rounds": cfg.compute.rounds,
        "train.tokens": t.tokens,
        "train.batch_tokens": t.batch_tokens,
        "train.seq_len": t.seq_len,
        "train.accumulation": t.accumulation,
        "train.nonfinite_limit": t.nonfinite_limit,
        "eval.batch": cfg.eval.batch,
        "finetune.epochs": cfg.finetune.epochs,
        "checkpoint.every": cfg.checkpoint.every,
        "checkpoint.keep": cfg.checkpoint.keep,
        "log.every": cfg.log.every,
        "log.profile_steps": cfg.log.profile_steps,
        "data.prefetch": cfg.data.prefetch,
        "data.max_document_bytes": cfg.data.max_document_bytes,
        "tokenizer.sample_bytes": cfg.tokenizer.sample_bytes,
        "tokenizer.vocab_size": cfg.tokenizer.vocab_size,
    }
    for name, value in at_least_one.items():
        if value < 1:
            yield f"{name}={value}: must be at least 1"
    at_least_zero = {
        "compute.microbatches": cfg.compute.microbatches,
        "optim.lr": o.lr,
        "optim.warmup_tokens": o.warmup_tokens,
        "optim.decay_tokens": o.decay_tokens,
        "optim.weight_decay": o.weight_decay,
        "optim.clip": o.clip,
        "train.z_loss": t.z_loss,
        "train.seed": t.seed,
        "finetune.lm_weight": cfg.finetune.lm_weight,
        "data.workers": cfg.data.workers,
        "eval.every": cfg.eval.every,
        "eval.sample_every": cfg.eval.sample_every,
        "eval.tasks_every": cfg.eval.tasks_every,
        "eval.task_limit": cfg.eval.task_limit,
        "eval.temperature": cfg.eval.temperature,
        "checkpoint.keep_every": cfg.checkpoint.keep_every,
        "log.peak_tflops": cfg.log.peak_tflops,
        "log.profile_start": cfg.log.profile_start,
        **{f"watch.{stage}": limit for stage, limit in vars(cfg.watch).items()},
    }
    yield from _name_problems(cfg)
    for name, value in at_least_zero.items():
        if not value >= 0:
            yield f"{name}={value}: must not be negative"
    if cfg.finetune.task == "none":
        usual = vars(type(cfg.finetune)())
        for name, value in vars(cfg.finetune).items():
            if value != usual[name]:
                yield f"finetune.{name}={value}: only `gptjax finetune` heeds it; leave it out"
    yield from tune_problems(cfg.finetune, m, "finetune")
    yield from lora_problems(cfg.finetune.lora, "finetune.lora")
    shares = {
        "train.ema_decay": t.ema_decay,
        "finetune.dropout": cfg.finetune.dropout,
        "optim.b1": o.b1,
        "optim.b2": o.b2,
        "data.valid_fraction": cfg.data.valid_fraction,
    }
    for name, value in shares.items():
        if not 0 <= value < 1:
            yield f"{name}={value}: must be at least 0 and below 1"
    if not 0 < cfg.eval.top_p <= 1:
        yield f"eval.top_p={cfg.eval.top_p}: must be above 0 and at most 1"
    if t.seed >= 2**32:
        yield f"train.seed={t.seed}: must be below 2**32, which is what JAX's generator takes"
    if t.seq_len > m.context:
        yield (
            f"train.seq_len={t.seq_len}: longer than model.context={m.context}; lower the one or "
            "raise the other"
        )
    if not _divides(t.seq_len, t.batch_tokens):
        yield (
            f"train.batch_tokens={t.batch_tokens}: is no multiple of train.seq_len={t.seq_len}; "
            f"use {_nearest_multiples(t.batch_tokens, t.seq_len)}"
        )
    elif t.seq_len >= 1 and not _divides(t.accumulation, t.batch):
        yield (
            f"train.accumulation={t.accumulation}: does not divide the {t.batch} sequences of a "
            f"batch; legal values near it are {_near(t.accumulation, divisors(t.batch))}"
        )
    if o.warmup_tokens > t.tokens:
        yield f"optim.warmup_tokens={o.warmup_tokens}: more than train.tokens={t.tokens}"
    if o.lr_schedule == "wsd" and o.decay_tokens + o.warmup_tokens > t.tokens:
        yield (
            f"optim.decay_tokens={o.decay_tokens}: with optim.warmup_tokens={o.warmup_tokens} "
            f"more than train.tokens={t.tokens}"
        )
    if cfg.eval.sample_tokens >= m.context:
        yield (
            f"eval.sample_tokens={cfg.eval.sample_tokens}: must be below "
            f"model.context={m.context}, which holds the prompt as well"
        )
    if "://" in cfg.run:
        yield f"run={cfg.run}: must be a local or mounted folder"
    if not cfg.data.sources:
        yield "data.sources=(): name at least one source"
    if not cfg.data.valid_sources and cfg.data.valid_fraction == 0:
        yield "data.valid_fraction=0.0: with no data.valid_sources there is nothing to validate on"
    yield from task_problems(cfg.eval.tasks, "eval.tasks")
    yield from _tokenizer_problems(cfg.tokenizer)
    needed = 258 if cfg.tokenizer.kind == "bytes" else cfg.tokenizer.vocab_size
    if not cfg.tokenizer.path and m.vocab_size < needed:
        yield (
            f"model.vocab_size={m.vocab_size}: smaller than the tokenizer's {needed}; raise it "
            "(a multiple of 128 suits the hardware)"
        )


TASK_KINDS = ("arc", "hellaswag", "lambada", "squad")


def task_problems(entries: Sequence[str], option: str) -> Iterator[str]:
    """Every entry that is not KIND:FILE with a known kind, or is there twice; reads no file."""
    for entry in dict.fromkeys(entries):
        kind, colon, file = entry.partition(":")
        if not colon or not file:
            yield f"{option}={entry}: must be KIND:FILE, such as hellaswag:hellaswag_val.jsonl"
        elif kind not in TASK_KINDS:
            yield f"{option}={entry}: unknown kind {kind!r}; known: {', '.join(TASK_KINDS)}"
        if entries.count(entry) > 1:
            yield f"{option}={entry}: given twice"


ALGORITHMS = {"sentencepiece": ("bpe", "unigram"), "huggingface": ("byte_bpe", "wordpiece")}


def _tokenizer_problems(tokenizer: Any) -> Iterator[str]:
    if tokenizer.kind == "bytes" or tokenizer.path:
        return  # nothing is trained
    if tokenizer.algorithm not in ALGORITHMS[tokenizer.kind]:
        yield (
            f"tokenizer.algorithm={tokenizer.algorithm}: not with tokenizer.kind={tokenizer.kind}, "
            f"which trains {' or '.join(ALGORITHMS[tokenizer.kind])}"
        )
    elif tokenizer.algorithm == "byte_bpe" and 1 <= tokenizer.vocab_size < 257:
        yield (
            f"tokenizer.vocab_size={tokenizer.vocab_size}: byte_bpe needs at least 257, the bytes "
            "and the end of a document"
        )


def model_problems(m: Any) -> Iterator[str]:
    """Every value of a ModelConfig that is out of its range, or does not go with another."""
    at_least_one = {
        **{f"model.{k}": getattr(m, k) for k in _MODEL_SIZES},
        "model.heads": m.heads,
        "model.kv_heads": m.kv,
        "model.head_dim": 1 if m.head_dim is None else m.head_dim,
        "model.mlp": m.hidden,
    }
    for name, value in at_least_one.items():
        if value < 1:
            yield f"{name}={value}: must be at least 1"
    at_least_zero = {
        "model.attention_soft_cap": m.attention_soft_cap,
        "model.logit_soft_cap": m.logit_soft_cap,
        "model.moe.experts": m.moe.experts,
        "model.moe.shared": m.moe.shared,
        "model.moe.capacity": m.moe.capacity,
        "model.moe.balance_loss": m.moe.balance_loss,
        "model.moe.router_z_loss": m.moe.router_z_loss,
    }
    for name, value in at_least_zero.items():
        if not value >= 0:
            yield f"{name}={value}: must not be negative"
    if not 0 <= m.dropout < 1:
        yield f"model.dropout={m.dropout}: must be at least 0 and below 1"
    if m.head_dim is None and not _divides(m.heads, m.embed):
        yield (
            f"model.heads={m.heads}: does not divide model.embed={m.embed}; legal values near it "
            f"are {_near(m.heads, divisors(m.embed))}, or set model.head_dim"
        )
    if not _divides(m.kv, m.heads):
        yield (
            f"model.kv_heads={m.kv}: does not divide model.heads={m.heads}; legal values near it "
            f"are {_near(m.kv, divisors(m.heads))}"
        )
    if m.positions == "rope":
        yield from _rope_problems(m)
    if m.alibi != "exact" and m.positions != "alibi":
        yield f"model.alibi={m.alibi}: only with model.positions=alibi"
    if m.moe.experts and not 1 <= m.moe.top_k <= m.moe.experts:
        yield (
            f"model.moe.top_k={m.moe.top_k}: must be at least 1 and at most "
            f"model.moe.experts={m.moe.experts}"
        )
    if m.moe.experts and m.expert_hidden < 1:
        yield f"model.moe.hidden={m.expert_hidden}: must be at least 1"
    if m.moe.experts and m.activation != "swiglu":
        yield f"model.activation={m.activation}: experts are swiglu layers; set it so"
    if m.moe.experts and m.linear_bias:
        yield "model.linear_bias=True: experts have no biases; set it to False"
    if not m.pattern:
        yield "model.pattern=(): needs at least one entry, for example full"
    elif not _divides(len(m.pattern), m.layers):
        yield (
            f"model.layers={m.layers}: is no multiple of the {len(m.pattern)} entries of "
            f"model.pattern; use {_nearest_multiples(m.layers, len(m.pattern))}"
        )
    if "window" in m.pattern and (m.window is None or m.window < 1):
        yield f"model.window={m.window}: model.pattern has windowed layers; give their width"
    if m.shared_norm and m.residual != "parallel":
        yield "model.shared_norm=True: only with model.residual=parallel"
    if m.norm_position == "post" and m.residual == "parallel":
        yield "model.norm_position=post: only with model.residual=sequential"


def _rope_problems(m: Any) -> Iterator[str]:
    rope = m.rope
    if not 0 < rope.fraction <= 1:
        yield f"model.rope.fraction={rope.fraction}: must be above 0 and at most 1"
    elif m.heads >= 1 and int(m.head * rope.fraction) % 2:
        yield (
            f"model.head_dim={m.head}: rotary positions need an even width, and "
            f"{int(m.head * rope.fraction)} of it are rotated"
        )
    if not rope.theta > 0:
        yield f"model.rope.theta={rope.theta}: must be above 0"
    if not rope.factor >= 1:
        yield f"model.rope.factor={rope.factor}: must be at least 1"
    if rope.scaling in ("low_frequency", "yarn") and rope.original_context < 1:
        yield (
            f"model.rope.original_context={rope.original_context}: model.rope.scaling="
            f"{rope.scaling} needs the context before stretching"
        )
    if rope.scaling == "low_frequency" and not 0 < rope.low_freq_factor < rope.high_freq_factor:
        yield (
            f"model.rope.low_freq_factor={rope.low_freq_factor}: must be above 0 and below "
            f"model.rope.high_freq_factor={rope.high_freq_factor}"
        )
    if rope.scaling == "yarn" and not 0 < rope.beta_slow < rope.beta_fast:
        yield (
            f"model.rope.beta_slow={rope.beta_slow}: must be above 0 and below "
            f"model.rope.beta_fast={rope.beta_fast}"
        )


def tune_problems(tune: Any, model: Any, option: str) -> Iterator[str]:
    """Every value of a TuneConfig that is out of its range; `option` is its dotted name."""
    yield from _pattern_problems(tune.freeze, f"{option}.freeze")
    if not 0 <= tune.freeze_layers <= model.layers:
        yield (
            f"{option}.freeze_layers={tune.freeze_layers}: must be at least 0 and at most "
            f"model.layers={model.layers}"
        )
    if not 0 < tune.layer_decay <= 1:
        yield f"{option}.layer_decay={tune.layer_decay}: must be above 0 and at most 1"


def lora_problems(lora: Any, option: str) -> Iterator[str]:
    """Every value of a LoraConfig that is out of its range; `option` is its dotted name."""
    if lora.rank < 0:
        yield f"{option}.rank={lora.rank}: must not be negative"
    if lora.rank == 0 and lora != type(lora)():
        yield f"{option}.rank=0: there are no adapters, and {option} has other values; give a rank"
    if not lora.alpha > 0:
        yield f"{option}.alpha={lora.alpha}: must be above 0"
    if not lora.targets:
        yield f"{option}.targets=(): name at least one, for example blocks/.*/attn/(q|v)"
    yield from _pattern_problems(lora.targets, f"{option}.targets")


def _pattern_problems(patterns: Sequence[str], option: str) -> Iterator[str]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{option}={pattern}: is no regular expression: {error}"


def _near(value: int, legal: Sequence[int]) -> str:
    below = [v for v in legal if v < value][-1:]
    above = [v for v in legal if v > value][:1]
    return " and ".join(map(str, below + above))


def mesh_problems(cfg: Any, sizes: Mapping[str, int], processes: int) -> Iterator[str]:
    """Every dimension that a mesh axis would have to split and cannot."""
    m, t, tensor, fsdp = cfg.model, cfg.train, sizes["tensor"], sizes["fsdp"]
    stages, copies = sizes["stage"], sizes["data"] * fsdp * sizes["expert"]
    rows = stages * copies
    split = [
        ("tensor", tensor, "model.heads", m.heads),
        ("tensor", tensor, "model.kv_heads", m.kv),
        ("fsdp", fsdp, "model.embed", m.embed),
        ("stage x data x fsdp x expert", rows, "eval.batch", cfg.eval.batch),
    ]
    if min(m.vocab_size, m.vocab_multiple) >= 1 and m.table % tensor:
        split.append(("tensor", tensor, "model.vocab_multiple", m.vocab_multiple))
    if m.moe.experts:
        split += [
            ("tensor", tensor, "model.moe.hidden", m.expert_hidden),
            ("expert", sizes["expert"], "model.moe.experts", m.moe.experts),
        ]
        if m.moe.shared:
            width = m.moe.shared * m.expert_hidden
            split.append(("tensor x fsdp", tensor * fsdp, "model.moe.shared x hidden", width))
    else:
        both = "tensor" if fsdp == 1 else "tensor x fsdp"
        split.append((both, tensor * fsdp, "model.mlp", m.hidden))
    if (context := sizes["context"]) > 1:
        split.append(("2 x context", 2 * context, "train.seq_len", t.seq_len))
        if m.moe.experts and m.moe.capacity:
            value = m.moe.capacity
            yield f"model.moe.capacity={value}: not with mesh.context={context}; set it to 0"
    if stages > 1 and m.pattern:
        stretches = stages * cfg.compute.rounds * len(m.pattern)
        split.append(("stage x compute.rounds x pattern", stretches, "model.layers", m.layers))
        if cfg.compute.rounds > 1 and cfg.optim.name == "adafactor":
            yield (
                f"compute.rounds={cfg.compute.rounds}: not with optim.name=adafactor, whose state "
                "has the layers of small parameters in one; set it to 1"
            )
    elif stages == 1:
        for name in ("microbatches", "rounds"):
            value = getattr(cfg.compute, name)
            if value > 1:
                yield f"compute.{name}={value}: only with mesh.stage above 1"
    microbatches = cfg.compute.microbatches or stages
    if microbatches % stages:
        yield (
            f"compute.microbatches={microbatches}: no multiple of mesh axis stage={stages}; use "
            f"{_nearest_multiples(microbatches, stages)}"
        )
    if stages > 1 and cfg.finetune.task != "none":
        yield f"mesh.stage={stages}: fine-tuning has no pipeline; set it to 1"
    if sizes["expert"] > 1 and not m.moe.experts:
        yield f"mesh.expert={sizes['expert']}: model.moe.experts=0, so there is nothing to split"
    for axis, parts, name, size in split:
        if size % parts:
            yield (
                f"{name}={size}: mesh axis {axis}={parts} does not divide it; use "
                f"{_nearest_multiples(size, parts)}, or an axis of {_near(parts, divisors(size))}"
            )
    unit, what = copies * microbatches, "mesh axes stage x data x fsdp x expert"
    if microbatches != stages:
        what = "mesh axes data x fsdp x expert, times compute.microbatches"
    if min(t.seq_len, t.accumulation) >= 1 and (micro := t.batch // t.accumulation) % unit:
        yield (
            f"train.batch_tokens={t.batch_tokens}: the {micro} sequences of one accumulation step "
            f"are not divisible by {what} = {unit}; use "
            f"{_nearest_multiples(t.batch_tokens, unit * t.accumulation * t.seq_len)}"
        )
    if rows % processes and processes % rows:
        yield (
            f"mesh: stage x data x fsdp x expert = {rows} and {processes} processes do not divide "
            "each other, so no process has whole rows of the batch"
        )
