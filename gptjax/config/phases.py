"""The course of a run: from a step to its stage, its batch, and the tokens seen before it.

A run is a sequence of phases: successive steps of one stage whose batches have one shape. They
follow from the configuration alone, so every process and every resume has the same. `cfg` is a
Config, whose type cannot be imported here because schema.py imports this file.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Phase:
    """Steps first..last-1, counted from 0, with batches of `batch` sequences of `seq_len` tokens.

    stage: the name of their stage; empty without stages. tokens: number seen before them.
    """

    stage: str
    first: int
    last: int
    tokens: int
    batch: int
    seq_len: int

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.seq_len

    def tokens_at(self, step: int) -> int:
        """Tokens seen when so many steps are done, all of them as long as these."""
        return self.tokens + (step - self.first) * self.batch_tokens


def phases(cfg: Any) -> tuple[Phase, ...]:
    """The phases of a run, in their order. A stage ends with the step that reaches its tokens."""
    found: list[Phase] = []
    step = tokens = 0
    for name, end in ends(cfg).items():
        seq_len = _seq_len_of(cfg, name)
        for size, until in _batches(cfg, name):
            if tokens < (until := end if until is None else min(until, end)):
                last = step - (tokens - until) // size  # rounded up
                found.append(Phase(name, step, last, tokens, size // seq_len, seq_len))
                step, tokens = last, found[-1].tokens_at(last)
    return tuple(found)


def ends(cfg: Any) -> dict[str, int]:
    """Tokens seen when each stage ends, by its name; a run without stages has one without name."""
    if not cfg.stages:
        return {"": cfg.train.tokens}
    rest = cfg.train.tokens - sum(stage.tokens for stage in cfg.stages.values())
    found, end = {}, 0
    for name, stage in cfg.stages.items():
        end += stage.tokens or rest
        found[name] = end
    return found


def _seq_len_of(cfg: Any, stage: str) -> int:
    """Length of the sequences of a stage, in tokens."""
    return (stage and cfg.stages[stage].seq_len) or cfg.train.seq_len


def batch_tokens_of(cfg: Any, stage: str) -> int:
    """Tokens of a stage's batches, of the largest ones where they grow."""
    return (stage and cfg.stages[stage].batch_tokens) or cfg.train.batch_tokens


def _batches(cfg: Any, stage: str) -> Iterator[tuple[int, int | None]]:
    """Tokens of a batch, and the number of tokens seen at which the next size begins."""
    t, full = cfg.train, batch_tokens_of(cfg, stage)
    if t.batch_ramp_tokens and full == t.batch_tokens:
        steps = (full - t.batch_start_tokens) // t.batch_increment_tokens
        for done in range(steps):
            until = -(-t.batch_ramp_tokens * (done + 1) // steps)
            yield t.batch_start_tokens + done * t.batch_increment_tokens, until
    yield full, None


# --- by step -------------------------------------------------------------------------------------


def phase_at(found: Sequence[Phase], step: int) -> Phase:
    """The phase of a step, counted from 0; the last one for steps beyond the end."""
    return next((phase for phase in found if step < phase.last), found[-1])


def tokens_at(cfg: Any, step: int) -> int:
    """Tokens seen when so many steps are done."""
    return phase_at(phases(cfg), step).tokens_at(step)


def between(found: Sequence[Phase], first: int, last: int) -> Iterator[Phase]:
    """The phases of steps first..last-1, cut to these steps; the last one goes on for ever."""
    for phase in found:
        stop = last if phase is found[-1] else min(last, phase.last)
        if (start := max(first, phase.first)) < stop:
            yield replace(phase, first=start, last=stop, tokens=phase.tokens_at(start))


def borders(cfg: Any) -> set[int]:
    """The numbers of steps after which a stage ends and another begins."""
    pairs = itertools.pairwise(phases(cfg))
    return {one.last for one, following in pairs if one.stage != following.stage}


def weights_of(cfg: Any, stage: str) -> Mapping[str, float]:
    """The weights of the mixture's parts in a stage, by name; without a mixture that of one part,
    whose name is empty."""
    given: Mapping[str, float] = cfg.stages[stage].weights if stage else {}
    return given or {name: part.weight for name, part in cfg.data.mixture.items()} or {"": 1.0}


def shares_of(cfg: Any) -> dict[str, float]:
    """The share of each part of the mixture in the tokens of the whole run, by name."""
    shares = dict.fromkeys(weights_of(cfg, ""), 0.0)
    found = phases(cfg)
    for phase in found:
        weights = weights_of(cfg, phase.stage)
        tokens = phase.tokens_at(phase.last) - phase.tokens
        for name, weight in weights.items():
            shares[name] += weight / sum(weights.values()) * tokens
    total = found[-1].tokens_at(found[-1].last)
    return {name: tokens / total for name, tokens in shares.items()}


def model_of(cfg: Any, stage: str) -> Any:
    """The model of a stage, with the stage's rotary positions."""
    if not stage:
        return cfg.model
    given = cfg.stages[stage]
    changed = {"theta": given.rope_theta, "factor": given.rope_factor}
    changed = {name: value for name, value in changed.items() if value}
    if given.rope_scaling != "model":
        changed["scaling"] = given.rope_scaling
    return replace(cfg.model, rope=replace(cfg.model.rope, **changed))


def trained(cfg: Any, step: int) -> Any:
    """The configuration of a run with the model as it is after so many steps."""
    stage = phase_at(phases(cfg), max(0, step - 1)).stage
    return replace(cfg, model=model_of(cfg, stage))


# --- accumulation --------------------------------------------------------------------------------


def rows_unit(cfg: Any, sizes: Mapping[str, int]) -> int:
    """What the sequences of an accumulation step are a multiple of, on a mesh of these sizes."""
    replicas = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    return int(replicas * (cfg.compute.microbatches or sizes["stage"]))


def accumulation_of(cfg: Any, phase: Phase, unit: int = 1) -> int:
    """The accumulation steps of a phase: as few as leave each at most the tokens that
    train.accumulation leaves of train.batch_tokens, so that no phase needs more memory.

    At least `unit` sequences are in each, a multiple of it.
    """
    t = cfg.train
    if (phase.batch_tokens, phase.seq_len) == (t.batch_tokens, t.seq_len):
        return int(t.accumulation)
    most = max(1, phase.batch // unit)  # accumulation steps
    rows = max(1, t.batch_tokens // t.accumulation // phase.seq_len)
    least = min(most, -(-phase.batch // rows))
    return next((n for n in range(least, most) if phase.batch % (n * unit) == 0), most)


# --- one stage by itself -------------------------------------------------------------------------


def of_stage(cfg: Any, stage: str, sizes: Mapping[str, int]) -> Any:
    """A configuration that trains as a stage does when its batch has grown, and has no stages.

    On a mesh of these sizes; the learning rate is left out.
    """
    phase = next(phase for phase in reversed(phases(cfg)) if phase.stage == stage)
    train = replace(
        grown(cfg).train,
        tokens=phase.tokens_at(phase.last) - _begin(cfg, stage),
        batch_tokens=phase.batch_tokens,
        seq_len=phase.seq_len,
        accumulation=accumulation_of(cfg, phase, rows_unit(cfg, sizes)),
    )
    plain = type(cfg.optim)()
    optim = replace(plain, name=cfg.optim.name, lr_schedule="constant")
    return replace(cfg, model=model_of(cfg, stage), train=train, optim=optim, stages={})


def grown(cfg: Any) -> Any:
    """The configuration with the whole batch from its first step."""
    sizes = ("batch_ramp_tokens", "batch_start_tokens", "batch_increment_tokens")
    return replace(cfg, train=replace(cfg.train, **dict.fromkeys(sizes, 0)))


def _begin(cfg: Any, stage: str) -> int:
    """Tokens seen when a stage begins."""
    return next(phase.tokens for phase in phases(cfg) if phase.stage == stage)


def shortened(cfg: Any, steps: int) -> Any:
    """The configuration with so many steps, fewer than it has: later stages are left out."""
    tokens, kept, before = tokens_at(cfg, steps), {}, 0
    begun = [phase.stage for phase in phases(cfg) if phase.first < steps]
    for name, end in ends(cfg).items():
        if name in begun and name:
            until = tokens if name == begun[-1] else end
            kept[name] = replace(cfg.stages[name], tokens=until - before)
            before = until
    return replace(cfg, train=replace(cfg.train, tokens=tokens), stages=kept)
