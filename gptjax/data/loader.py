"""The input pipeline: windows from `MixtureOrder`, tokens from the store, prefetched by tf.data.

tf.data keeps no state that must be saved: a pipeline starts at any step. TensorFlow is imported
only when a pipeline is built, in another thread, and never sees an accelerator.

Shapes: N steps, B sequences of this process, T sequence length, W = T + 1 window length.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax import bucket
from gptjax.config import Config, phases
from gptjax.config.phases import Phase
from gptjax.data import mixture, tf_import
from gptjax.data.mixture import Manifests
from gptjax.data.mixture_order import MixtureOrder
from gptjax.data.packing import INDEX, Packing, open_packing
from gptjax.data.store import MANIFEST, Reader
from gptjax.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Windows of tokens, in which position t predicts t + 1.

    windows_BW: int32; lengths_B: int32, the number of a window's T targets that count in the loss.
    """

    windows_BW: np.ndarray
    lengths_B: np.ndarray


def training_windows(tokens: int, seq_len: int) -> int:
    """The number of complete training windows, each of which shares one token with the next."""
    return (tokens - 1) // seq_len


def is_prepared(cfg: Config) -> bool:
    """Whether the stores are there, and the rows of whole documents where there are to be any."""
    for part in mixture.part_configs(cfg).values():
        folder = bucket.path_of(part.data.store)
        wanted = [MANIFEST]
        if cfg.data.packing == "documents":
            wanted += [f"packed-{phase.seq_len}/{INDEX}" for phase in phases.phases(cfg)]
        if not all((folder / name).exists() for name in wanted):
            return False
    return True


@dataclass(frozen=True)
class TrainData:
    """The training windows of one store or of a mixture's, in their order.

    `packings` has the rows of each part by their length, where rows hold whole documents.
    """

    readers: tuple[Reader, ...]
    order: MixtureOrder
    phases: tuple[Phase, ...]
    packings: Mapping[int, tuple[Packing, ...]]

    @classmethod
    def open(cls, cfg: Config, manifests: Manifests) -> "TrainData":
        """The configured training data. Raises DataError for a store without a whole window."""
        parts, found = mixture.part_configs(cfg), phases.phases(cfg)
        cache = (cfg.data.cache, cfg.data.cache_gb)
        readers = {
            name: Reader(part.data.store, "train", manifests.parts[name], *cache)
            for name, part in parts.items()
        }
        packings = {}
        if cfg.data.packing == "documents":
            packings = {
                length: {
                    name: open_packing(part.data.store, manifests.parts[name], length)
                    for name, part in parts.items()
                }
                for length in {phase.seq_len for phase in found}
            }

        def windows(name: str, seq_len: int) -> int:
            tokens = len(readers[name])
            rows = packings[seq_len][name] if packings else None
            count = training_windows(tokens, seq_len) if rows is None else len(rows)
            if count < 1:
                stage = next(phase.stage for phase in found if phase.seq_len == seq_len)
                field = f"stages.{stage}" if stage else "train"
                raise DataError(
                    f"data.store={parts[name].data.store}: {tokens} training tokens, too few for a "
                    f"window of {field}.seq_len={seq_len}; give more text"
                )
            return count

        order = mixture.order(cfg, windows)
        by_length = {length: tuple(rows.values()) for length, rows in packings.items()}
        return cls(tuple(readers.values()), order, found, by_length)

    def read(self, steps: range, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The windows of the given rows (default: all) of the batches of steps, int32 [N, B, W],
        and the number of targets in each, int32 [N, B].

        Steps count from 0, and all are of one phase. Raises DataError as `Reader.windows` does.
        """
        both_NBX = self._read(steps, rows)
        return both_NBX[..., :-1], both_NBX[..., -1]

    def _read(self, steps: range, rows: np.ndarray | None) -> np.ndarray:
        """As `read`, with the number of targets after each window, int32 [N, B, W + 1]."""
        seq_len = phases.phase_at(self.phases, steps.start).seq_len
        parts_NB, ids_NB = self.order.places_of(steps, rows)
        parts_N, ids_N = parts_NB.ravel(), ids_NB.ravel()
        both_NX = np.zeros((len(ids_N), seq_len + 2), np.int32)
        windows_NW, targets_N = both_NX[:, :-1], both_NX[:, -1]
        targets_N[:] = seq_len
        for part, reader in enumerate(self.readers):
            here = np.flatnonzero(parts_N == part)
            if self.packings:
                packing = self.packings[seq_len][part]
                targets_N[here] = packing.read_into(windows_NW, here, ids_N[here], reader)
            else:
                starts = ids_N[here] * seq_len
                reader.read_into(map(windows_NW.__getitem__, here.tolist()), starts)
        if windows_NW.size and windows_NW.max() >= self.readers[0].vocab_size:
            self._raise_at_the_wrong_id(windows_NW, parts_N, ids_N, seq_len)
        return both_NX.reshape(*ids_NB.shape, seq_len + 2)

    def _raise_at_the_wrong_id(
        self, windows_NW: np.ndarray, parts_N: np.ndarray, ids_N: np.ndarray, seq_len: int
    ) -> None:
        for part, number, window_W in zip(parts_N.tolist(), ids_N, windows_NW, strict=True):
            if window_W.max() < self.readers[part].vocab_size:
                continue
            if not self.packings:
                self.readers[part].windows(number[None] * seq_len, seq_len + 1)
            for start, length, _ in zip(*self.packings[seq_len][part].row(number), strict=True):
                self.readers[part].windows(start[None], int(length))

    def documents_at(self, step: int, start_id: int) -> dict[tuple[int, int], tuple[int, int]]:
        """For each (part, window) of a step's batch: the document that it begins in, and where.

        Reads all tokens before them; not for rows of whole documents, which know theirs.
        """
        seq_len = phases.phase_at(self.phases, step).seq_len
        found: dict[tuple[int, int], tuple[int, int]] = {}
        parts, windows = self.order.places(step)
        for part, reader in enumerate(self.readers):
            own = [window for p, window in zip(parts, windows, strict=True) if p == part]
            places = reader.documents_at([window * seq_len for window in own], start_id)
            found |= {(part, window): at for window, at in zip(own, places, strict=True)}
        return found

    def epochs(self, step: int) -> dict[str, float]:
        """Epochs completed after so many steps, by the names of metrics: epochs, or epochs/PART."""
        done = self.order.epochs_at(step).items()
        return {f"epochs/{name}" if name else "epochs": epochs for name, epochs in done}

    def batches(
        self, first: int, last: int, rows_of: Mapping[int, np.ndarray], prefetch: int
    ) -> Iterator[Batch]:
        """Yields rows of the batches of steps first..last-1, prefetched by tf.data.

        `rows_of` has them by the size of a batch: this process's rows.
        """
        for phase in phases.between(self.phases, first, last):
            rows = rows_of[phase.batch]
            read = lambda steps, rows=rows: self._read(steps, rows)
            for both_BX in _stream(read, phase.first, phase.last, prefetch):
                yield Batch(both_BX[:, :-1], both_BX[:, -1])


def eval_batches(
    reader: Reader, seq_len: int, batch: int, rows: np.ndarray, prefetch: int
) -> Iterator[Batch]:
    """Yields this process's rows of the whole split in order, with every target exactly once.

    The last batch is padded with rows of length 0.
    """
    targets = len(reader) - 1
    count = -(-targets // seq_len)

    def read(steps: range) -> np.ndarray:
        starts = [np.minimum((step * batch + rows) * seq_len, targets) for step in steps]
        return np.stack([reader.windows(starts_B, seq_len + 1) for starts_B in starts])

    for step, windows_BW in enumerate(_stream(read, 0, -(-count // batch), prefetch)):
        left = targets - (step * batch + rows) * seq_len
        yield Batch(windows_BW, np.clip(left, 0, seq_len).astype(np.int32))


def bench(cfg: Config, manifests: Manifests, seconds: float) -> tuple[float, float, float]:
    """Lowest, median and highest tokens per second of training batches, of nine measurements: of
    the batches that the run ends with."""
    tf_import.importing().result()
    data = TrainData.open(cfg, manifests)
    last = data.phases[-1]
    stream = data.batches(
        last.first, 1 << 40, {last.batch: np.arange(last.batch)}, cfg.data.prefetch
    )
    rates = []
    for measurement in range(10):
        began, tokens = time.perf_counter(), 0
        while time.perf_counter() - began < seconds / 10:
            tokens += next(stream).windows_BW[:, 1:].size
        if measurement:  # the first is the warm-up
            rates.append(tokens / (time.perf_counter() - began))
    return min(rates), statistics.median(rates), max(rates)


def _stream(
    read: Callable[[range], np.ndarray], first: int, last: int, prefetch: int
) -> Iterator[np.ndarray]:
    """Yields what `read` has of steps first..last-1, prefetched by tf.data in another thread.

    A tf.data call costs 0.25 ms whatever its size, so each call reads several steps, and `read`
    returns their batches in one array. Until TensorFlow is imported, steps are read as they are
    asked for.
    """
    importing = tf_import.importing()
    while first < last and not importing.done():
        yield from read(range(first, first + 1))
        first += 1
    if first >= last:
        return
    tf = importing.result()
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")
    count = -(-prefetch // 2)

    failures: list[Exception] = []  # in reading: tf.data raises an error of its own

    def read_block(start: np.ndarray) -> np.ndarray:
        try:
            return read(range(int(start), min(int(start) + count, last)))
        except Exception as error:
            failures.append(error)
            raise

    @tf.autograph.experimental.do_not_convert
    def block(start: Any) -> Any:
        return tf.numpy_function(read_block, [start], tf.int32, stateful=False)

    options = tf.data.Options()
    # Autotune's thread sleeps for longer and longer, and the end of a stream waits for it: 20-40 s.
    options.autotune.enabled = False
    blocks = tf.data.Dataset.range(first, last, count).map(block).prefetch(2)
    blocks = blocks.with_options(options)
    try:
        for steps in blocks.as_numpy_iterator():
            yield from steps
    except tf.errors.OpError:
        if failures:
            raise failures[0] from None
        raise
