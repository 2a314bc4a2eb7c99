"""Validation of a configuration: legal values, alone, together, and on a number of devices.

All problems are reported at once, each as `dotted.field=value: what is wrong and what to do`. `cfg`
is a Config, whose type cannot be imported here because schema.py imports this file.
"""

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from gptjax.config import phases, ranges
from gptjax.config.base_validation import finetune_problems, start_problems
from gptjax.config.data_validation import data_problems
from gptjax.config.limits import out_of_range, place_problems, too_large
from gptjax.config.registry import ATTENTION_BACKENDS, METRIC_WRITERS, OPTIMIZERS
from gptjax.config.stage_validation import (
    growth_problems,
    phase_problems,
    ramp_problems,
    stage_problems,
)

TASK_KINDS = ("arc", "hellaswag", "lambada", "squad")

_MODEL_AT_LEAST_1 = ("vocab_size", "vocab_multiple", "context", "layers", "embed", "heads")
_MODEL_AT_LEAST_0 = (
    *("attention_soft_cap", "logit_soft_cap", "moe.experts", "moe.shared"),
    *("moe.capacity", "moe.balance_loss", "moe.router_z_loss"),
)
_AT_LEAST_1 = (
    *("compute.loss_chunks", "compute.rounds", "train.tokens", "train.batch_tokens"),
    *("train.seq_len", "train.accumulation", "train.nonfinite_limit", "eval.batch"),
    *("finetune.epochs", "checkpoint.every", "checkpoint.keep", "log.every", "log.profile_steps"),
    *("checkpoint.local_every", "checkpoint.local_keep", "spike.window"),
    *("data.prefetch", "data.max_document_bytes", "tokenizer.sample_bytes", "eval.sample_tokens"),
    "tokenizer.vocab_size",
)
_AT_LEAST_0 = (
    *("compute.microbatches", "optim.lr", "optim.warmup_tokens", "optim.decay_tokens"),
    *("optim.weight_decay", "optim.clip", "train.z_loss", "train.seed", "finetune.lm_weight"),
    *("data.workers", "data.cache_gb"),
    *("eval.every", "eval.sample_every", "eval.tasks_every", "eval.task_limit"),
    *("eval.temperature", "checkpoint.keep_every", "log.peak_tflops", "log.profile_start"),
    *("watch.lost", "watch.restore", "watch.compile", "watch.data", "watch.step", "watch.save"),
    *("watch.eval", "watch.audit_every", "watch.straggler", "log.profile_slow", "log.metrics_port"),
    "checkpoint.upload_mb_s",
    *("train.check_replicas", "train.batch_ramp_tokens"),
    *("spike.threshold", "spike.before", "spike.after", "spike.rewinds"),
)
_FROM_0_BELOW_1 = (
    *("train.ema_decay", "finetune.dropout", "optim.b1", "optim.b2", "data.valid_fraction"),
)


# --- ranges and divisors -------------------------------------------------------------------------


def _fields(section: Any, names: Sequence[str], prefix: str = "") -> dict[str, float]:
    """Values by dotted name of the fields below a section, whose own name is the prefix."""
    return {prefix + name: attrgetter(name)(section) for name in names}


def _below(minimum: int, values: Mapping[str, float]) -> Iterator[str]:
    """Problems of values below a minimum, or NaN."""
    legal = "must not be negative" if minimum == 0 else f"must be at least {minimum}"
    for name, value in values.items():
        if not value >= minimum:
            yield f"{name}={value}: {legal}"


def _not_a_fraction(values: Mapping[str, float]) -> Iterator[str]:
    """Problems of values outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            yield f"{name}={value}: must be at least 0 and below 1"


def divisors(n: int) -> list[int]:
    """The positive divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _divides(part: int, whole: int) -> bool:
    """Whether `part` divides `whole`; true below 1, which is reported as out of range instead."""
    return part < 1 or whole % part == 0


def _nearest_multiples(n: int, of: int) -> str:
    """The multiples of `of` next to n, as an error message lists them."""
    below, above = n // of * of, -(-n // of) * of
    return str(above) if below == 0 else f"{below} or {above}"


def _nearest(value: int, legal: Sequence[int]) -> str:
    """The legal values next to `value`, as an error message lists them."""
    below = [v for v in legal if v < value][-1:]
    above = [v for v in legal if v > value][:1]
    return " or ".join(map(str, below + above))


# --- values, alone and together ------------------------------------------------------------------


def value_problems(cfg: Any) -> Iterator[str]:
    """Problems of values that are illegal, alone or with another value; one of each field."""
    general = list(out_of_range(cfg))
    if any("2**53" in problem for problem in general):
        yield from general
        return  # what follows divides and multiplies
    particular = list(_particular_problems(cfg))
    if not particular and not general:  # with sizes that divide each other
        particular = [*ramp_problems(cfg.train), *stage_problems(cfg), *_stretched_problems(cfg)]
        particular = particular or list(growth_problems(cfg))
    told = {problem.partition("=")[0] for problem in particular}
    yield from (problem for problem in general if problem.partition("=")[0] not in told)
    yield from particular


def _particular_problems(cfg: Any) -> Iterator[str]:
    """Problems of a field's own limits, and of fields together."""
    yield from model_problems(cfg.model)
    yield from _below(1, _fields(cfg, _AT_LEAST_1))
    yield from _below(0, _fields(cfg, _AT_LEAST_0))
    yield from _not_a_fraction(_fields(cfg, _FROM_0_BELOW_1))
    yield from _name_problems(cfg)
    yield from _train_problems(cfg)
    yield from schedule_problems(cfg)
    yield from spike_problems(cfg)
    yield from start_problems(cfg)
    yield from finetune_problems(cfg)
    yield from _eval_problems(cfg)
    yield from data_problems(cfg)
    yield from place_problems(cfg)


def _stretched_problems(cfg: Any) -> Iterator[str]:
    """Problems of the rotary positions that a stage has."""
    for name in cfg.stages:
        model = phases.model_of(cfg, name)
        if model != cfg.model and (problems := list(_rope_problems(model))):
            yield f"stages.{name}: of its rotary positions, {problems[0]}"


def _name_problems(cfg: Any) -> Iterator[str]:
    """Problems of names that are not registered."""
    if cfg.optim.name not in OPTIMIZERS.names():
        yield OPTIMIZERS.unknown(cfg.optim.name)
    if cfg.compute.attention not in ("auto", *ATTENTION_BACKENDS.names()):
        yield ATTENTION_BACKENDS.unknown(cfg.compute.attention)
    for name in cfg.log.writers:
        if name not in METRIC_WRITERS.names():
            yield METRIC_WRITERS.unknown(name)


def _train_problems(cfg: Any) -> Iterator[str]:
    """Problems of seed, batch and window."""
    m, t = cfg.model, cfg.train
    if t.seed >= 2**32:
        yield f"train.seed={t.seed}: must be below 2**32, the range of JAX's generator"
    if t.seq_len > m.context:
        yield (
            f"train.seq_len={t.seq_len}: above model.context={m.context}; lower it, or raise "
            "model.context"
        )
    if not _divides(t.seq_len, t.batch_tokens):
        yield (
            f"train.batch_tokens={t.batch_tokens}: not a multiple of train.seq_len={t.seq_len}; "
            f"use {_nearest_multiples(t.batch_tokens, t.seq_len)}"
        )
    elif t.seq_len >= 1 and not _divides(t.accumulation, t.batch):
        yield (
            f"train.accumulation={t.accumulation}: does not divide the {t.batch} sequences of a "
            f"batch; use {_nearest(t.accumulation, divisors(t.batch))}"
        )


def spike_problems(cfg: Any) -> Iterator[str]:
    """Problems of the steps that are left out, of spikes, and of a port."""
    if cfg.log.metrics_port > 65535:
        yield f"log.metrics_port={cfg.log.metrics_port}: must be at most 65535"
    for text in cfg.train.leave_out:
        try:
            ranges.parse([text])
        except ValueError:
            yield f"train.leave_out={text}: must be a step, 57, or steps, 41-44, counted from 1"
    if cfg.spike.threshold and cfg.checkpoint.local:
        yield (
            f"spike.threshold={cfg.spike.threshold}: not together with checkpoint.local, whose "
            "checkpoints of after a spike no other machine can remove"
        )


def schedule_problems(cfg: Any) -> Iterator[str]:
    """Problems of the optimizer and its learning-rate schedule."""
    t, o = cfg.train, cfg.optim
    if not o.eps > 0:
        yield f"optim.eps={o.eps}: must be above 0; the update divides by it where gradients are 0"
    if not 0 <= o.final_lr_ratio <= 1:
        yield f"optim.final_lr_ratio={o.final_lr_ratio}: must be from 0 to 1"
    if o.warmup_tokens > t.tokens:
        yield (
            f"optim.warmup_tokens={o.warmup_tokens}: above train.tokens={t.tokens}; lower it, or "
            "raise train.tokens"
        )
    if o.lr_schedule == "inverse_sqrt" and o.warmup_tokens == 0:
        yield "optim.warmup_tokens=0: required by optim.lr_schedule=inverse_sqrt; give some"
    if o.lr_schedule != "wsd" and o.decay_shape != "linear":
        yield (
            f"optim.decay_shape={o.decay_shape}: not used by optim.lr_schedule={o.lr_schedule}; "
            "leave it out, or set optim.lr_schedule=wsd"
        )
    if o.lr_schedule in ("constant", "inverse_sqrt"):
        if o.decay_tokens > 0:
            yield (
                f"optim.decay_tokens={o.decay_tokens}: not used by optim.lr_schedule="
                f"{o.lr_schedule}; leave it out, or set optim.lr_schedule=wsd"
            )
    elif o.decay_tokens == 0 and o.lr_schedule == "wsd":
        yield (
            "optim.decay_tokens=0: optim.lr_schedule=wsd would never decay; set it, for instance "
            f"to {t.tokens // 10} (a tenth of train.tokens), or optim.lr_schedule=constant"
        )
    elif o.decay_tokens and o.decay_tokens + o.warmup_tokens > t.tokens:
        yield (
            f"optim.decay_tokens={o.decay_tokens}: together with optim.warmup_tokens="
            f"{o.warmup_tokens} above train.tokens={t.tokens}; lower one of them"
        )


def _eval_problems(cfg: Any) -> Iterator[str]:
    """Problems of evaluation tasks and samples."""
    if not 0 < cfg.eval.top_p <= 1:
        yield f"eval.top_p={cfg.eval.top_p}: must be above 0 and at most 1"
    if cfg.eval.sample_tokens >= cfg.model.context:
        yield (
            f"eval.sample_tokens={cfg.eval.sample_tokens}: must be below model.context="
            f"{cfg.model.context}, which includes the prompt"
        )
    yield from task_problems(cfg.eval.tasks, "eval.tasks")


def task_problems(entries: Sequence[str], option: str) -> Iterator[str]:
    """Problems of entries that are not KIND:FILE with a known kind, or repeated; reads no file."""
    for entry in dict.fromkeys(entries):
        kind, colon, file = entry.partition(":")
        if not colon or not file:
            yield f"{option}={entry}: must be KIND:FILE, such as hellaswag:hellaswag_val.jsonl"
        elif kind not in TASK_KINDS:
            yield f"{option}={entry}: unknown kind {kind!r}; known: {', '.join(TASK_KINDS)}"
        if entries.count(entry) > 1:
            yield f"{option}={entry}: given twice; give it once"


# --- the model -----------------------------------------------------------------------------------


def model_problems(m: Any) -> Iterator[str]:
    """Problems of a ModelConfig: values that are illegal, alone or with another value."""
    if problems := list(too_large(m)):
        yield from problems
        return
    yield from _below(1, _fields(m, _MODEL_AT_LEAST_1, "model."))
    head_dim = 1 if m.head_dim is None else m.head_dim
    resolved = {"kv_heads": m.kv, "head_dim": head_dim, "mlp": m.hidden}
    yield from _below(1, {f"model.{name}": value for name, value in resolved.items()})
    yield from _below(0, _fields(m, _MODEL_AT_LEAST_0, "model."))
    yield from _not_a_fraction({"model.dropout": m.dropout})
    if m.norm_eps <= 0 or 1 <= m.norm_eps < float("inf"):  # others are told as not finite
        yield f"model.norm_eps={m.norm_eps}: must be above 0 and below 1"
    yield from _attention_problems(m)
    if m.positions == "rope":
        yield from _rope_problems(m)
    if m.moe.experts:
        yield from _moe_problems(m)
    if m.shared_norm and m.residual != "parallel":
        yield "model.shared_norm=True: requires model.residual=parallel"
    if m.norm_position == "post" and m.residual == "parallel":
        yield "model.norm_position=post: requires model.residual=sequential"


def _attention_problems(m: Any) -> Iterator[str]:
    """Problems of heads, ALiBi and the pattern of windowed layers."""
    if m.head_dim is None and not _divides(m.heads, m.embed):
        yield (
            f"model.heads={m.heads}: does not divide model.embed={m.embed}; use "
            f"{_nearest(m.heads, divisors(m.embed))}, or set model.head_dim"
        )
    if not _divides(m.kv, m.heads):
        yield (
            f"model.kv_heads={m.kv}: does not divide model.heads={m.heads}; use "
            f"{_nearest(m.kv, divisors(m.heads))}"
        )
    if m.alibi != "exact" and m.positions != "alibi":
        yield f"model.alibi={m.alibi}: requires model.positions=alibi"
    if not m.pattern:
        yield "model.pattern=(): give at least one entry, such as full"
    elif not _divides(len(m.pattern), m.layers):
        yield (
            f"model.layers={m.layers}: not a multiple of the {len(m.pattern)} entries of "
            f"model.pattern; use {_nearest_multiples(m.layers, len(m.pattern))}"
        )
    if "window" in m.pattern and (m.window is None or m.window < 1):
        yield (
            f"model.window={m.window}: model.pattern has windowed layers; give their window, in "
            "tokens"
        )


def _moe_problems(m: Any) -> Iterator[str]:
    """Problems of a mixture of experts."""
    if not 1 <= m.moe.top_k <= m.moe.experts:
        yield (
            f"model.moe.top_k={m.moe.top_k}: must be at least 1 and at most "
            f"model.moe.experts={m.moe.experts}"
        )
    yield from _below(1, {"model.moe.hidden": m.expert_hidden})
    if m.activation != "swiglu":
        yield f"model.activation={m.activation}: not available with experts; set it to swiglu"
    if m.linear_bias:
        yield "model.linear_bias=True: not available with experts; set it to False"


def _rope_problems(m: Any) -> Iterator[str]:
    """Problems of rotary positions."""
    rope = m.rope
    if not 0 < rope.fraction <= 1:
        yield f"model.rope.fraction={rope.fraction}: must be above 0 and at most 1"
    elif m.heads >= 1 and int(m.head * rope.fraction) % 2:
        yield (
            f"model.head_dim={m.head}: {int(m.head * rope.fraction)} dimensions would be rotated; "
            "rotary positions need an even number of them"
        )
    if not rope.theta > 0:
        yield f"model.rope.theta={rope.theta}: must be above 0"
    yield from _below(1, {"model.rope.factor": rope.factor})
    if rope.scaling in ("low_frequency", "yarn") and rope.original_context < 1:
        yield (
            f"model.rope.original_context={rope.original_context}: required by model.rope.scaling="
            f"{rope.scaling}; give the context before scaling, in tokens"
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


# --- devices -------------------------------------------------------------------------------------


def mesh_problems(cfg: Any, sizes: Mapping[str, int], processes: int) -> Iterator[str]:
    """Problems of a mesh: dimensions that an axis does not divide, and unsupported combinations.

    `sizes` are the axis sizes by name, as `MeshConfig.shape` returns them.
    """
    yield from _split_problems(cfg, sizes)
    yield from _pipeline_problems(cfg, sizes["stage"])
    yield from _batch_problems(cfg, sizes, processes)
    if not list(value_problems(cfg)):  # which a phase relies on
        yield from phase_problems(cfg, sizes)
    moe = cfg.model.moe
    if (context := sizes["context"]) > 1 and moe.experts and moe.capacity:
        yield (
            f"model.moe.capacity={moe.capacity}: not available with mesh.context={context}; set it "
            "to 0"
        )
    if sizes["expert"] > 1 and not moe.experts:
        yield f"mesh.expert={sizes['expert']}: model.moe.experts=0 has no experts; set it to 1"


def _split_problems(cfg: Any, sizes: Mapping[str, int]) -> Iterator[str]:
    """Problems of dimensions that the mesh axes over them do not divide."""
    m, tensor, fsdp = cfg.model, sizes["tensor"], sizes["fsdp"]
    batch_axes = sizes["stage"] * sizes["data"] * fsdp * sizes["expert"]
    split = [
        ("tensor", tensor, "model.heads", m.heads),
        ("tensor", tensor, "model.kv_heads", m.kv),
        ("fsdp", fsdp, "model.embed", m.embed),
        ("stage x data x fsdp x expert", batch_axes, "eval.batch", cfg.eval.batch),
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
        axes = "tensor" if fsdp == 1 else "tensor x fsdp"
        split.append((axes, tensor * fsdp, "model.mlp", m.hidden))
    if (context := sizes["context"]) > 1:
        split.append(("2 x context", 2 * context, "train.seq_len", cfg.train.seq_len))
    if (stages := sizes["stage"]) > 1 and m.pattern:
        virtual = stages * cfg.compute.rounds * len(m.pattern)
        split.append(("stage x compute.rounds x pattern", virtual, "model.layers", m.layers))
    for axis, parts, name, size in split:
        if size % parts:
            yield (
                f"{name}={size}: mesh axis {axis}={parts} does not divide it; use "
                f"{_nearest_multiples(size, parts)}, or an axis of "
                f"{_nearest(parts, divisors(size))}"
            )


def _pipeline_problems(cfg: Any, stages: int) -> Iterator[str]:
    """Problems of the pipeline's schedule, or of its fields without a pipeline."""
    compute = cfg.compute
    if stages == 1:
        for name in ("microbatches", "rounds"):
            if (value := getattr(compute, name)) > 1:
                yield f"compute.{name}={value}: requires mesh.stage above 1"
    if (microbatches := compute.microbatches or stages) % stages:
        yield (
            f"compute.microbatches={microbatches}: not a multiple of mesh.stage={stages}; use "
            f"{_nearest_multiples(microbatches, stages)}"
        )
    if stages > 1 and compute.rounds > 1 and cfg.optim.name == "adafactor":
        yield (
            f"compute.rounds={compute.rounds}: not available with optim.name=adafactor, whose "
            "state joins the layers of small parameters; set it to 1"
        )
    if stages > 1 and cfg.finetune.task != "none":
        yield f"mesh.stage={stages}: fine-tuning has no pipeline; set it to 1"


def _batch_problems(cfg: Any, sizes: Mapping[str, int], processes: int) -> Iterator[str]:
    """Problems of a batch that devices, microbatches or processes do not divide."""
    t, stages = cfg.train, sizes["stage"]
    unit, axes = phases.rows_unit(cfg, sizes), "mesh axes stage x data x fsdp x expert"
    replicas = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    if (cfg.compute.microbatches or stages) != stages:
        axes = "mesh axes data x fsdp x expert, times compute.microbatches"
    if min(t.seq_len, t.accumulation) >= 1 and (step := t.batch // t.accumulation) % unit:
        yield (
            f"train.batch_tokens={t.batch_tokens}: the {step} sequences of an accumulation step "
            f"are not divisible by {axes} = {unit}; use "
            f"{_nearest_multiples(t.batch_tokens, unit * t.accumulation * t.seq_len)}"
        )
    shards = stages * replicas
    if shards % processes and processes % shards:
        yield (
            f"mesh: stage x data x fsdp x expert = {shards} and {processes} processes do not "
            "divide each other, so processes would share sequences; change an axis or the number "
            "of processes"
        )
