"""Language-modelling loss of documents: each is scored on its own, and every token once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.config import DataConfig
from gptjax.data import sources
from gptjax.errors import DataError
from gptjax.evaluate.bootstrap import Statistic
from gptjax.evaluate.scoring import Scorer
from gptjax.model.decoder import Params
from gptjax.tokenizer import Tokenizer
from gptjax.training.metrics import perplexity

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Documents:
    """Whole documents; `more` if the sources have others after them."""

    texts: list[str]
    more: bool

    @property
    def counted(self) -> tuple[int, int | None]:
        """The number of documents, and of all in the sources; None if that is not known."""
        return len(self.texts), None if self.more else len(self.texts)

    @classmethod
    def read(cls, patterns: Sequence[str], cfg: DataConfig, limit: int = 0) -> "Documents":
        """The documents of sources, named as in `data.sources`; at most `limit`, or all with 0.

        Raises DataError for a file or record that cannot be read, and for sources without text.
        """
        texts: list[str] = []
        for text in _documents(patterns, cfg):
            if limit and len(texts) == limit:
                return cls(texts, True)
            texts.append(text)
        if not texts:
            raise DataError(f"--text={' '.join(patterns)}: no text in it")
        return cls(texts, False)


def _documents(patterns: Sequence[str], cfg: DataConfig) -> Iterator[str]:
    """Whole documents, joined where reading splits a long one."""
    parts: list[str] = []
    for source in sources.resolve(tuple(patterns), "--text"):
        for document in source.documents(cfg, sources.Counts()):
            parts.append(document.text)
            if document.ends:
                yield "".join(parts)
                parts = []


def sliding_windows(ids: np.ndarray, length: int, stride: int) -> Iterator[Pair]:
    """Pairs (context, continuation) of a sliding window; each token of ids[1:] is in exactly one
    continuation.

    The model reads at most `length` tokens of a pair. The first continuation has up to `length`
    tokens, each later one up to `stride`, after as much context as fits: at least
    length - stride + 1 tokens before every target. With stride=length and a prefix token at ids[0]
    these are the windows of lm_eval's rolling log-likelihood.
    """
    start = 1
    while start < len(ids):
        stop = min(len(ids), start + (length if start == 1 else stride))
        yield ids[max(0, stop - 1 - length) : start], ids[start:stop]
        start = stop


class TextLoss:
    """An evaluator: loss, perplexity and bits per byte of documents, none of which sees another.

    loss is nats per token; the first token is predicted from `Tokenizer.prefix_id`, and no EOS is
    predicted. bits_per_byte divides by the UTF-8 bytes of the text, so it compares across
    tokenizers; it includes the bits of text that the tokens do not give back. `length` and `stride`
    are those of `sliding_windows`, in tokens.
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
        self._lost_bits = np.array([tokenizer.lost_bits(text) for text in documents.texts])
        prefix = np.array([tokenizer.prefix_id], np.uint32)
        self._pairs: list[Pair] = []
        self._document: list[int] = []  # of each pair
        self.tokens = 0
        for number, text in enumerate(documents.texts):
            ids = np.concatenate([prefix, tokenizer.encode_documents([text], [False])])
            pairs = list(sliding_windows(ids, length, stride))
            self._pairs += pairs
            self._document += [number] * len(pairs)
            self.tokens += len(ids) - 1

    def measure(self, params: Params) -> list[Statistic]:
        """loss, perplexity and bits_per_byte, with an entry for each document."""
        scores = self._scorer.score(params, self._pairs, self._name)
        per_document = lambda values: np.bincount(self._document, values, len(self._bytes))
        nats = -per_document([score.logprob for score in scores])
        tokens = per_document([score.tokens for score in scores])
        return [
            Statistic(f"{self._name}_loss", nats, tokens),
            Statistic(f"{self._name}_perplexity", nats, tokens, perplexity),
            Statistic(
                f"{self._name}_bits_per_byte", nats / math.log(2) + self._lost_bits, self._bytes
            ),
        ]

    def lost_bits_per_byte(self) -> dict[str, float]:
        """Bits per byte that the tokens do not give back, by name; empty without a loss."""
        bits = float(self._lost_bits.sum())
        return {f"{self._name}_lost_bits_per_byte": bits / self.bytes} if bits else {}

    def run(self, params: Params) -> dict[str, float]:
        """text_loss, text_perplexity, text_bits_per_byte, text_tokens, text_bytes; where the tokens
        do not give back all of the text, text_lost_bits_per_byte too."""
        return {
            **{statistic.name: statistic.value for statistic in self.measure(params)},
            **self.lost_bits_per_byte(),
            f"{self._name}_tokens": self.tokens,
            f"{self._name}_bytes": self.bytes,
        }
