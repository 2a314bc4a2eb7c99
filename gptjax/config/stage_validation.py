"""Validation of what changes during a run: growing batches and stages.

Problems are told as in validation.py.
"""

import re
from collections.abc import Iterator
from typing import Any

from gptjax.config import phases

_LARGEST_COUNT = 1000
"""Sizes of a growing batch; each of them is compiled by itself."""


def ramp_problems(t: Any) -> Iterator[str]:
    """Problems of a growing batch; `t` is a TrainConfig."""
    full, start, increment = t.batch_tokens, t.batch_start_tokens, t.batch_increment_tokens
    if t.batch_ramp_tokens == 0:
        for name in ("batch_start_tokens", "batch_increment_tokens"):
            if value := getattr(t, name):
                yield f"train.{name}={value}: requires train.batch_ramp_tokens; set it to 0"
        return
    for name, value in (("batch_start_tokens", start), ("batch_increment_tokens", increment)):
        if value < 1 or value % t.seq_len:
            yield (
                f"train.{name}={value}: must be a multiple of train.seq_len={t.seq_len}, at least "
                "that"
            )
            return
    if start >= full:
        yield f"train.batch_start_tokens={start}: must be below train.batch_tokens={full}"
    elif (full - start) % increment:
        yield (
            f"train.batch_increment_tokens={increment}: does not divide the {full - start} tokens "
            "from train.batch_start_tokens to train.batch_tokens; use "
            f"{_near_divisors(full - start, increment, t.seq_len)}"
        )
    elif (full - start) // increment > _LARGEST_COUNT:
        yield (
            f"train.batch_increment_tokens={increment}: makes {(full - start) // increment} sizes "
            f"of a batch, each compiled by itself; at most {_LARGEST_COUNT} are allowed, and a "
            "dozen are plenty"
        )
    if t.batch_ramp_tokens >= t.tokens:
        yield (
            f"train.batch_ramp_tokens={t.batch_ramp_tokens}: must be below train.tokens={t.tokens}"
        )


def _near_divisors(n: int, value: int, unit: int) -> str:
    """The next divisors of n that are multiples of `unit`, below and above a value."""
    legal = [d * unit for d in range(1, min(n // unit, 100_000) + 1) if (n // unit) % d == 0]
    below, above = [d for d in legal if d < value][-1:], [d for d in legal if d > value][:1]
    return " or ".join(map(str, below + above)) or str(unit)


def growth_problems(cfg: Any) -> Iterator[str]:
    """Problems of a growing batch that no step has."""
    t = cfg.train
    if not t.batch_ramp_tokens:
        return
    if cfg.finetune.task != "none":
        yield (
            f"train.batch_ramp_tokens={t.batch_ramp_tokens}: only used by `gptjax train`; leave it "
            "out"
        )
    found = phases.phases(cfg)
    if all(p.batch_tokens == phases.batch_tokens_of(cfg, p.stage) for p in found):
        yield (
            f"train.batch_ramp_tokens={t.batch_ramp_tokens}: not used, as no stage that has "
            "train.batch_tokens begins within them; set it to 0"
        )


def stage_problems(cfg: Any) -> Iterator[str]:
    """Problems of the stages, alone and together; the model's and the mesh's aside."""
    if not cfg.stages:
        return
    if cfg.finetune.task != "none":
        yield f"stages={', '.join(cfg.stages)}: only used by `gptjax train`; leave them out"
        return
    problems = [p for name, one in cfg.stages.items() for p in _stage_problems(cfg, name, one)]
    problems = problems or list(_length_problems(cfg))
    yield from problems
    if not problems:
        yield from _continuity_problems(cfg)


def _stage_problems(cfg: Any, name: str, one: Any) -> Iterator[str]:
    """Problems of one stage by itself."""
    t, prefix = cfg.train, f"stages.{name}"
    if not re.fullmatch(r"\w[\w-]*", name):
        yield f"{prefix}: the name of a stage has letters, digits, _ and - only"
        return
    for field in ("tokens", "seq_len", "batch_tokens", "rope_theta"):
        if (value := getattr(one, field)) < 0:
            yield f"{prefix}.{field}={value}: must not be negative"
            return
    seq_len, batch = one.seq_len or t.seq_len, one.batch_tokens or t.batch_tokens
    if seq_len > cfg.model.context:
        yield f"{prefix}.seq_len={seq_len}: above model.context={cfg.model.context}; raise that"
    if batch % seq_len:
        yield (
            f"{prefix}.batch_tokens={batch}: not a multiple of the stage's seq_len={seq_len}; use "
            f"{max(1, batch // seq_len) * seq_len}"
        )
    elif batch == t.batch_tokens and t.batch_ramp_tokens:
        sizes = {t.batch_start_tokens, t.batch_increment_tokens}
        if odd := sorted(size for size in sizes if size % seq_len):
            yield (
                f"{prefix}.seq_len={seq_len}: the growing batch has sizes that are no multiple of "
                f"it, by {odd[0]}; give the stage its own batch_tokens"
            )
    yield from _rate_problems(prefix, one)
    yield from _rope_field_problems(cfg, prefix, one)
    yield from _weight_problems(cfg, prefix, one)


def _rate_problems(prefix: str, one: Any) -> Iterator[str]:
    """Problems of a stage's learning rate."""
    if not 0 <= one.final_lr_ratio <= 1:
        yield f"{prefix}.final_lr_ratio={one.final_lr_ratio}: must be from 0 to 1"
    if one.lr_ratio is not None and not 0 <= one.lr_ratio <= 1:
        yield f"{prefix}.lr_ratio={one.lr_ratio}: must be from 0 to 1"
    if one.lr_schedule == "optim" and one.lr_ratio is not None:
        yield f"{prefix}.lr_ratio={one.lr_ratio}: requires {prefix}.lr_schedule"
    if one.lr_schedule in ("optim", "constant") and one.final_lr_ratio:
        yield (
            f"{prefix}.final_lr_ratio={one.final_lr_ratio}: not used by {prefix}.lr_schedule="
            f"{one.lr_schedule}; leave it out, or set another"
        )


def _rope_field_problems(cfg: Any, prefix: str, one: Any) -> Iterator[str]:
    """Problems of a stage's rotary positions; what they make of the model is checked elsewhere."""
    if cfg.model.positions != "rope":
        for field, default in (("rope_theta", 0), ("rope_scaling", "model"), ("rope_factor", 0)):
            if (value := getattr(one, field)) != default:
                yield f"{prefix}.{field}={value}: requires model.positions=rope"
    elif one.rope_factor and not one.rope_factor >= 1:
        yield f"{prefix}.rope_factor={one.rope_factor}: must be at least 1"
    elif (
        one.rope_factor
        and phases.model_of(cfg, prefix.removeprefix("stages.")).rope.scaling == "none"
    ):
        yield f"{prefix}.rope_factor={one.rope_factor}: requires {prefix}.rope_scaling"


def _weight_problems(cfg: Any, prefix: str, one: Any) -> Iterator[str]:
    """Problems of a stage's weights of the mixture."""
    for part, weight in one.weights.items():
        if part not in cfg.data.mixture:
            known = ", ".join(cfg.data.mixture) or "there is no data.mixture"
            yield f"{prefix}.weights.{part}={weight}: no part of that name; known: {known}"
        elif not weight >= 0:
            yield f"{prefix}.weights.{part}={weight}: must not be negative"
    if one.weights and not sum(one.weights.values()) > 0:
        yield f"{prefix}.weights: are all 0; give a part a weight"


def _length_problems(cfg: Any) -> Iterator[str]:
    """Problems of the stages' lengths together."""
    total, given = cfg.train.tokens, sum(one.tokens for one in cfg.stages.values())
    open_ones = [name for name, one in cfg.stages.items() if not one.tokens]
    if len(open_ones) > 1:
        first, second = open_ones[:2]
        yield (
            f"stages.{second}.tokens=0: stages.{first} has no length either, and only one stage "
            "can have what the others leave of train.tokens"
        )
    elif open_ones and given >= total:
        yield (
            f"stages.{open_ones[0]}.tokens=0: the other stages have {given} tokens, which leave it "
            f"nothing of train.tokens={total}"
        )
    elif not open_ones and given != total:
        yield (
            f"train.tokens={total}: the stages have {given} tokens; make it that, or leave out the "
            "length of one stage"
        )


def _continuity_problems(cfg: Any) -> Iterator[str]:
    """Problems of stages that have no step, and of fields that none of them uses."""
    found = {phase.stage for phase in phases.phases(cfg)}
    o, (first, *_) = cfg.optim, cfg.stages.values()
    if o.warmup_tokens and first.lr_schedule != "optim":
        yield (
            f"optim.warmup_tokens={o.warmup_tokens}: not used, as the first stage has a learning "
            "rate of its own; set it to 0"
        )
    for name, one in cfg.stages.items():
        if name not in found:
            yield (
                f"stages.{name}.tokens={one.tokens}: the last batch of the stage before is longer; "
                "raise it"
            )


def phase_problems(cfg: Any, sizes: Any) -> Iterator[str]:
    """Problems of batches on a mesh: those of a growing batch, and those of stages."""
    unit, context = phases.rows_unit(cfg, sizes), sizes["context"]
    told: set[str] = set()
    lengths = {cfg.train.seq_len}  # which is told by itself
    for phase in phases.phases(cfg):
        if (phase.batch_tokens, phase.seq_len) == (cfg.train.batch_tokens, cfg.train.seq_len):
            continue  # told as train.batch_tokens
        prefix = f"stages.{phase.stage}" if phase.stage else "train"
        if context > 1 and phase.seq_len % (2 * context) and phase.seq_len not in lengths:
            lengths.add(phase.seq_len)
            yield (
                f"{prefix}.seq_len={phase.seq_len}: mesh axis 2 x context={2 * context} does not "
                "divide it"
            )
        if phase.batch_tokens < phases.batch_tokens_of(cfg, phase.stage):
            if phase.batch % unit and "ramp" not in told:
                told.add("ramp")
                yield (
                    f"train.batch_start_tokens={cfg.train.batch_start_tokens}: a batch of "
                    f"{phase.batch} sequences is not divisible by the mesh's {unit}; use "
                    f"{ramp_on(cfg.train, unit * phase.seq_len)}"
                )
            continue
        if phase.batch % unit:
            rows = -(-phase.batch // unit) * unit
            yield (
                f"{prefix}.batch_tokens={phase.batch_tokens}: a batch of {phase.batch} "
                f"sequences is not divisible by the mesh's {unit}; use {rows * phase.seq_len}"
            )


def ramp_on(t: Any, unit: int) -> str:
    """The options of a growing batch whose sizes are multiples of `unit` tokens, near those given;
    to be pasted."""
    if t.batch_tokens % unit:
        return f"a train.batch_tokens that is a multiple of {unit}"
    start = -(-t.batch_start_tokens // unit) * unit
    if start >= t.batch_tokens:
        off = ("batch-ramp-tokens", "batch-start-tokens", "batch-increment-tokens")
        return " ".join(f"--train.{name} 0" for name in off)
    left = t.batch_tokens - start
    increments = range(-(-t.batch_increment_tokens // unit) * unit, left + 1, unit)
    increment = next((n for n in increments if left % n == 0), left)
    return f"--train.batch-start-tokens {start} --train.batch-increment-tokens {increment}"
