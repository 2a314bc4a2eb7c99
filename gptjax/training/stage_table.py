"""What a run with stages or a growing batch will do, as lines of text."""

from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp

from gptjax.config import Config, phases
from gptjax.training.lr_schedule import learning_rate

Epochs = Callable[[int], Mapping[str, float]]
"""The epochs of each part, by name, that are completed after so many steps."""

_ROW = "{:14} {:>19} {:>21} {:>25} {:>8}  {:22} {}"


def lines(cfg: Config, epochs: Epochs | None = None) -> Iterator[str]:
    """The stages in a table: where each ends in tokens and in steps, its batches, its learning rate
    in its first and its last step, its data; nothing where all steps are alike.

    Without `epochs` no text has been prepared, and the shares of the parts stand in their place.
    """
    found = phases.phases(cfg)
    if len(found) == 1 and not cfg.stages:
        return
    data = "epochs at its end" if epochs else "shares of the parts" if cfg.data.mixture else ""
    yield _ROW.format(
        "stage", "ends at token", "steps", "batch", "seq_len", "learning rate", data
    ).rstrip()
    schedule = learning_rate(cfg)
    for stage in phases.ends(cfg):
        own = [phase for phase in found if phase.stage == stage]
        first, last = own[0], own[-1]
        sizes = sorted({first.batch_tokens, last.batch_tokens})
        rates = [float(schedule(jnp.int32(step))) for step in (first.first, last.last - 1)]
        given = epochs(last.last) if epochs else _shares(phases.weights_of(cfg, stage))
        yield _ROW.format(
            stage or "the run",
            f"{last.tokens_at(last.last):,}",
            f"{first.first + 1:,} - {last.last:,}",
            " - ".join(f"{size:,}" for size in sizes),
            f"{first.seq_len:,}",
            f"{rates[0]:.4g} - {rates[1]:.4g}",
            ", ".join(f"{name} {value:.4g}".strip() for name, value in given.items()),
        ).rstrip()


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights as shares of their sum; none of data without a mixture."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items() if name and weight}
