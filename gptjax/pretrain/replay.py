"""A step of a run again, taken apart: the gradient's norm in each layer, and what each document of
the batch did to loss and gradient.

A loss is a sum over targets, and its gradient the sum of their gradients: so a document has a part
of both. Attention looks back only, so the part of the documents up to some place of a row is that
of the row cut there, and a document's is the difference of two. Each row is computed alone; where
that matters, as in a mixture of experts, whose capacity the rows of a batch share, parts add up to
about the whole.

Shapes: B sequences of a batch, T sequence length, W = T + 1.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import phases
from gptjax.config.phases import Phase
from gptjax.parallel import arrays, sharding
from gptjax.param_tree import Tree, leaves_by_path
from gptjax.pretrain.rerun import RunAgain
from gptjax.training import optimizer
from gptjax.training.step import TrainState, dropout_keys, gradients, init_and_dropout_keys


@dataclass(frozen=True)
class Piece:
    """What a row of a batch has of a document.

    part: the name of the mixture's part. begins: the piece's first token in the document. loss: its
    mean in nats a token. share: of the gradient's square, |g|^2 = sum of g_piece . g. norm: of its
    part of the gradient. shares: of the square of the gradient of each layer, as Step.layers.
    """

    row: int
    part: str
    document: int
    begins: int
    tokens: list[int]
    loss: float
    share: float
    norm: float
    shares: dict[str, float]


@dataclass(frozen=True)
class Step:
    """A step that was done again.

    recorded: its metrics in metrics.jsonl, if they are there. layers: the gradient's norm in each
    layer and outside of them, by name. clipped: what the gradient was multiplied by, at most 1.
    """

    number: int
    stage: str
    metrics: dict[str, float]
    recorded: dict[str, float] | None
    may_differ: str
    layers: dict[str, float]
    clipped: float
    pieces: list[Piece]

    def largest(self, layer: str) -> list[Piece]:
        """The pieces by the size of their shares of a layer's gradient, the largest first."""
        return sorted(self.pieces, key=lambda piece: -abs(piece.shares[layer]))


def replay(again: RunAgain, step: int) -> Step:
    """Trains from the nearest checkpoint up to a step, counted from 1, and takes the step apart."""
    first = again.checkpoint_before(step - 1)
    state = again.state_at(first)
    steps = again.steps(state, step)
    while int(state.step) < step - 1:
        _, state, _ = next(steps)
    phase = phases.phase_at(again.phases, step - 1)
    windows_BW, lengths_B = (x[0] for x in again.data.read(range(step - 1, step)))
    grads, targets = _gradient(again, phase, state, _batch(windows_BW, lengths_B))
    layers = _norms(again, grads)
    whole = (grads, targets)
    pieces = list(_pieces(again, phase, state, whole, layers, windows_BW, lengths_B))
    ((_, _, metrics),) = steps  # which consumes the state
    clip = again.cfg.optim.clip
    return Step(
        number=step,
        stage=phase.stage,
        metrics=metrics,
        recorded=again.recorded.get(step),
        may_differ=again.bits_may_differ(again.checkpoints.meta(first), step) if first else "",
        layers=layers,
        clipped=min(1.0, clip / metrics["grad_norm"]) if clip else 1.0,
        pieces=pieces,
    )


def _batch(windows_BW: np.ndarray, lengths_B: np.ndarray) -> Any:
    """A batch on the mesh, all rows of which each process has."""
    own = arrays.host_rows(len(lengths_B))
    rows = {"windows_BW": windows_BW[own], "lengths_B": lengths_B[own]}
    return arrays.global_batch(rows, len(lengths_B))


def _unit(again: RunAgain) -> int:
    """The smallest number of rows of a batch on the mesh."""
    return phases.rows_unit(again.cfg, dict(jax.sharding.get_mesh().shape))


def _gradient(
    again: RunAgain, phase: Phase, state: TrainState, batch: Any
) -> tuple[Tree, jax.Array]:
    """The gradient of a batch's mean loss, and the number of its targets."""
    cfg, loss_fn = again.cfg, again.task.loss_fn(phase)
    accumulation = phases.accumulation_of(cfg, phase, _unit(again))

    @jax.jit
    def of(state: TrainState, batch: Any) -> tuple[Tree, jax.Array]:
        keys_B2 = dropout_keys(cfg, state.step, phase.batch) if cfg.drops else None
        grads, sums = gradients(loss_fn, state.params, batch, keys_B2, accumulation)
        return grads, sums["targets"]

    return of(state, batch)


def _norms(again: RunAgain, grads: Tree) -> dict[str, float]:
    """The norm of a gradient in each array outside of the layers, and in each layer."""
    squares = jax.jit(lambda grads: _products(again, grads, grads))(grads)
    return {name: math.sqrt(square) for name, square in _by_layer(again, squares).items()}


def _products(again: RunAgain, one: Tree, two: Tree) -> dict[str, jax.Array]:
    """Inner products of two gradients' arrays, of stacked arrays of layers for each of them."""
    ones, twos = (leaves_by_path(again.task.to_model_params(tree)) for tree in (one, two))
    product = lambda a, b: a.astype(jnp.float32) * b.astype(jnp.float32)
    return {
        path: product(a, twos[path]).sum(tuple(range(path.startswith("blocks/"), a.ndim)))
        for path, a in ones.items()
    }


def _by_layer(again: RunAgain, products: Any) -> dict[str, float]:
    """The products of each array outside of the layers, and the sum of those of each layer."""
    period = len(again.cfg.model.pattern)
    on_host = jax.device_get(products)
    outside = {path: float(x) for path, x in on_host.items() if not path.startswith("blocks/")}
    layers = np.zeros(again.cfg.model.layers)
    for path, values in on_host.items():
        if path.startswith("blocks/"):
            layers[int(path.split("/")[1].removeprefix("layer_")) :: period] += values
    return outside | {f"layer {n}": float(product) for n, product in enumerate(layers)}


def _pieces(
    again: RunAgain,
    phase: Phase,
    state: TrainState,
    whole: tuple[Tree, jax.Array],
    layers: dict[str, float],
    windows_BW: np.ndarray,
    lengths_B: np.ndarray,
) -> Iterator[Piece]:
    """The pieces of a step's batch, in the order of its rows; `whole` is its gradient, `layers` the
    norms of that."""
    unit, start_id = _unit(again), again.manifests.start_id
    measure = _measure(again, phase, unit)
    nothing = jax.jit(lambda grads: jax.tree.map(jnp.zeros_like, grads))(whole[0])
    rows = zip(windows_BW, lengths_B.tolist(), _documents(again, int(state.step)), strict=True)
    with again.progress.bar("documents", len(lengths_B)) as bar:
        for row, (window_W, length, (part, documents, begins)) in enumerate(rows):
            places = [p for p in np.flatnonzero(window_W[:length] == start_id).tolist() if p]
            before = nothing, 0.0, 0.0
            for number, (first, last) in enumerate(itertools.pairwise([0, *places, length])):
                windows, lengths = (
                    np.zeros((unit, len(window_W)), np.int32),
                    np.zeros(unit, np.int32),
                )
                windows[0], lengths[0] = window_W, last
                batch = _batch(windows, lengths)
                grads, products, *sums = measure(state, whole, before[0], batch, jnp.int32(row))
                loss, targets, norm = (float(x) for x in jax.device_get(sums))
                of_layers = _by_layer(again, products)
                yield Piece(
                    row=row,
                    part=part,
                    document=documents(number),
                    begins=0 if number else begins,
                    tokens=window_W[first + 1 : last + 1].tolist(),
                    loss=(loss - before[1]) / max(1.0, targets - before[2]),
                    share=sum(of_layers.values()) / sum(one**2 for one in layers.values()),
                    norm=norm,
                    shares={
                        name: product / (layers[name] ** 2 or 1.0)
                        for name, product in of_layers.items()
                    },
                )
                before = grads, loss, targets
            bar.update(row + 1)


def _documents(again: RunAgain, step: int) -> Iterator[tuple[str, Callable[[int], int], int]]:
    """Of each row of a step's batch: its part, the documents of its pieces by their place in the
    row, and the place of the first piece in its document; -1 where that is not known."""
    data, start_id = again.data, again.manifests.start_id
    parts, windows = data.order.places(step)
    length = phases.phase_at(again.phases, step).seq_len
    places = {} if data.packings else data.documents_at(step, start_id)
    for part, window in zip(parts.tolist(), windows.tolist(), strict=True):
        name = data.order.names[part]
        if data.packings:
            starts, _, documents = data.packings[length][part].row(window)
            opens = data.readers[part].windows(starts[:1], 1)[0, 0] == start_id
            yield name, documents.tolist().__getitem__, 0 if opens else -1
        else:
            document, place = places[part, window]
            yield name, document.__add__, place


def _measure(again: RunAgain, phase: Phase, unit: int) -> Any:
    """A function of (state, the batch's gradient and number of targets, the gradient of the row up
    to a piece, the row up to the piece's end as a batch, the row's number): the gradient of the row
    up to the piece's end, products of the piece's with the batch's, the row's sums of loss and
    targets, and the norm of the piece's gradient."""
    cfg, grad_fn = again.cfg, jax.grad(again.task.loss_fn(phase), has_aux=True)

    def of(state: TrainState, whole: Any, before: Tree, batch: Any, row: jax.Array) -> Any:
        keys_B2 = None
        if cfg.drops:
            key = jax.random.fold_in(init_and_dropout_keys(cfg)[1], state.step)
            keys_B2 = jnp.tile(jax.random.key_data(jax.random.fold_in(key, row)), (unit, 1))
            keys_B2 = jax.sharding.reshard(keys_B2, sharding.spec("batch", None))
        grads, sums = grad_fn(state.params, batch, keys_B2)
        own = jax.tree.map(lambda new, old: (new - old) / whole[1], grads, before)
        products = _products(again, own, whole[0])
        return grads, products, sums["loss"], sums["targets"], optimizer.global_norm(own)

    return jax.jit(of)
