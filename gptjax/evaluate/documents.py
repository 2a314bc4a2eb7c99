"""The loss of documents, each on its own and each of its tokens once, however long they are."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.config import DataConfig
from gptjax.data import sources
from gptjax.errors import DataError
from gptjax.evaluate.bootstrap import Statistic
from gptjax.evaluate.scoring import Scorer, prefix_id
from gptjax.model.decoder import Params
from gptjax.tokenizer import Tokenizer
from gptjax.training.metrics import perplexity

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Documents:
    """Whole texts; `more` where there are others after them."""

    texts: list[str]
    more: bool

    @property
    def counted(self) -> tuple[int, int | None]:
        """How many, and of how many; None: of more."""
        return len(self.texts), None if self.more else len(self.texts)

    @classmethod
    def read(cls, patterns: Sequence[str], cfg: DataConfig, limit: int = 0) -> "Documents":
        """The documents of sources as `data.sources` takes them; with `limit`, the first so many.

        Raises DataError naming the file, and the record, that cannot be read, and where there is no
        text at all.
        """
        texts: list[str] = []
        for text in _whole(patterns, cfg):
            if limit and len(texts) == limit:
                return cls(texts, True)
            texts.append(text)
        if not texts:
            raise DataError(f"--text={' '.join(patterns)}: no text in it")
        return cls(texts, False)


def _whole(patterns: Sequence[str], cfg: DataConfig) -> Iterator[str]:
    pieces: list[str] = []
    for source in sources.resolve(tuple(patterns), "--text"):
        for document in sources.read(source, cfg, sources.Counts()):
            pieces.append(document.text)
            if document.ends:
                yield "".join(pieces)
                pieces = []


def windows(ids: np.ndarray, length: int, stride: int) -> Iterator[Pair]:
    """Pairs (context, continuation) whose continuations are ids[1:], each token in one of them.

    The model reads at most `length` tokens of a pair. The first window has as many targets, and
    each that follows `stride`, after as much context as there is room for; so a target of theirs
    has at least length - stride + 1 tokens before it. With stride=length and a prefix at ids[0]
    these are the windows of lm_eval's rolling log-likelihood.
    """
    start = 1
    while start < len(ids):
        stop = min(len(ids), start + (length if start == 1 else stride))
        yield ids[max(0, stop - 1 - length) : start], ids[start:stop]
        start = stop


class TextLoss:
    """Loss, perplexity and bits per byte of documents, each predicted from its own beginning alone.

    loss is nats per token; no EOS is predicted, and the first token is predicted from BOS (or EOS).
    bits_per_byte divides by the UTF-8 bytes of the text, so it compares across tokenizers.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        scorer: Scorer,
        length: int,
        stride: int,
        name: str = "text",
    ) -> None:
        self._scorer, self._name = scorer, name
        self._bytes = np.array([len(t.encode("utf-8", "replace")) for t in documents.texts])
        self.bytes = int(self._bytes.sum())
        prefix = np.array([prefix_id(tokenizer)], np.uint32)
        self._pairs: list[Pair] = []
        self._owner: list[int] = []
        self.tokens = 0
        for number, text in enumerate(documents.texts):
            ids = np.concatenate([prefix, tokenizer.encode_documents([text], [False])])
            cut = list(windows(ids, length, stride))
            self._pairs += cut
            self._owner += [number] * len(cut)
            self.tokens += len(ids) - 1

    def measure(self, params: Params) -> list[Statistic]:
        """loss, perplexity and bits_per_byte, over documents."""
        scores = self._scorer.score(params, self._pairs, self._name)
        total = lambda values: np.bincount(self._owner, values, len(self._bytes))
        nats = -total([score.logprob for score in scores])
        tokens = total([score.tokens for score in scores])
        return [
            Statistic(f"{self._name}_loss", nats, tokens),
            Statistic(f"{self._name}_perplexity", nats, tokens, perplexity),
            Statistic(f"{self._name}_bits_per_byte", nats / math.log(2), self._bytes),
        ]

    def run(self, params: Params) -> dict[str, float]:
        """text_loss, text_perplexity, text_bits_per_byte, text_tokens, text_bytes."""
        return {
            **{one.name: one.value for one in self.measure(params)},
            f"{self._name}_tokens": self.tokens,
            f"{self._name}_bytes": self.bytes,
        }
