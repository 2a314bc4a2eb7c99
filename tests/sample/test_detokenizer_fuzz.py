"""Streamed text, from any token on, is what decoding all of the tokens gives: for every kind of
tokenizer, over random tokens and over text cut anywhere.
"""

import functools
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import tokenizer as tokenizers
from gptjax.config import TokenizerConfig
from gptjax.sample.detokenizer import Continuation
from gptjax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

TEXT = (
    "def value(index):\n    return self[index]  # naïve café, it's 1234\n"
    "สวัสดีชาวโลก ค่ะ 🙂👩‍👩‍👧🇩🇪 日本語の文章です \ufffd для слова\n\n  two  spaces \t tab\n"
)
CORPUS = [TEXT * 20]
SPECIAL = "<|x|>"


def sentencepiece(**options) -> SentencePieceTokenizer:
    import sentencepiece as library

    model = io.BytesIO()
    given = {"vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False, "eos_id": 2}
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=model,
        control_symbols=[SPECIAL],
        minloglevel=2,
        max_sentence_length=10**6,
        character_coverage=0.98,
        **given | options,
    )
    return SentencePieceTokenizer(model.getvalue())


def huggingface(kind: str) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    common = {"special_tokens": ["</s>", SPECIAL], "show_progress": False, "vocab_size": 400}
    if kind == "byte-level":
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **common)
    else:  # as Llama's: spaces as U+2581, characters that are not known as bytes
        library = Tokenizer(models.BPE(byte_fallback=True, unk_token="</s>"))
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        common["special_tokens"] += [f"<0x{n:02X}>" for n in range(256)]
        common["vocab_size"] = 600
        trainer = trainers.BpeTrainer(**common)
    library.train_from_iterator(CORPUS, trainer)
    text = library.to_str()
    if kind != "byte-level":  # bytes are plain tokens
        import json

        values = json.loads(text)
        values["added_tokens"] = values["added_tokens"][:2]
        text = json.dumps(values)
    config = b'{"eos_token": "</s>", "additional_special_tokens": ["<|x|>"]}'
    return HuggingFaceTokenizer({"tokenizer.json": text.encode(), "tokenizer_config.json": config})


MAKERS = {
    "bytes": ByteTokenizer,
    "ours": lambda: tokenizers.train(CORPUS, TokenizerConfig(vocab_size=400)),
    "byte_bpe": lambda: tokenizers.train(
        CORPUS, TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=380)
    ),
    "sentencepiece bpe": lambda: sentencepiece(model_type="bpe"),
    "sentencepiece unigram": lambda: sentencepiece(model_type="unigram"),
    "sentencepiece without prefix": lambda: sentencepiece(
        model_type="bpe", add_dummy_prefix=False, remove_extra_whitespaces=False
    ),
    "byte-level": lambda: huggingface("byte-level"),
    "metaspace": lambda: huggingface("metaspace"),
}


@functools.cache
def made(kind: str) -> Tokenizer:
    return MAKERS[kind]()


def check(tokenizer: Tokenizer, prompt: list[int], ids: list[int], sizes: list[int]) -> None:
    known, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    same = next((n for n, c in enumerate(known) if whole[n : n + 1] != c), len(known))
    wanted = whole[same:]
    stream, streamed, rest = Continuation(tokenizer, prompt, ()), "", list(ids)
    for size in sizes:
        part, rest = rest[:size], rest[size:]
        streamed += stream.add(part)
        assert wanted.startswith(streamed)
    streamed += stream.add(rest, last=True)
    assert streamed == stream.text == wanted


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=75, deadline=None)
@given(data=st.data())
def test_random_tokens_are_streamed_as_they_are_decoded_together(kind, data) -> None:
    tokenizer = made(kind)
    # The ByteFallback decoder of `tokenizers` gives up a whole run of byte tokens where one byte is
    # invalid, also what was valid before it and has been streamed: no bytes in its random tokens.
    token = st.integers(258 if kind == "metaspace" else 0, tokenizer.vocab_size - 1)
    prompt = data.draw(st.lists(token, max_size=30))
    ids = data.draw(st.lists(token, max_size=40))
    check(tokenizer, prompt, ids, data.draw(st.lists(st.integers(1, 4), max_size=40)))


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_text_cut_anywhere_is_streamed_as_it_is_decoded_together(kind, data) -> None:
    tokenizer = made(kind)
    start = data.draw(st.integers(0, len(TEXT) - 1))
    ids = tokenizer.encode(TEXT[start:])
    cut = data.draw(st.integers(0, len(ids)))
    textless = lambda: [tokenizer.eos_id] * data.draw(st.sampled_from([0, 1, 12]))
    prompt, rest = [*ids[:cut], *textless()], ids[cut:]
    middle = data.draw(st.integers(0, len(rest)))
    rest = [*rest[:middle], *textless(), *rest[middle:]]
    check(tokenizer, prompt, rest, [1] * len(rest))
