"""How a document begins: the same in the store, in training, in prompts and in evaluation.

A language of eight sentences, equally likely, with a number of four digits has log2(80,000) bits a
document. Three of them are in the first word: they are found only by a model that is asked as it
was trained.
"""

import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from gptjax import tokenizer as tokenizers
from gptjax.checkpoint import run_dir
from gptjax.cli import main
from gptjax.data import store

REPO = Path(__file__).resolve().parents[2]
SENTENCES = [
    "alpha north kappa south.",
    "bravo south lemon south.",
    "delta eastm mango north.",
    "hotel westm alpha north.",
    "india north bravo eastm.",
    "kappa south delta eastm.",
    "lemon eastm hotel westm.",
    "mango westm india westm.",
]
BITS_PER_BYTE = math.log2(80_000) / 29
KINDS: dict[str, tuple[str, str | None]] = {  # a tokenizer's kind, and the BOS that it declares
    "sentencepiece": ("sentencepiece", None),
    "sentencepiece with BOS": ("sentencepiece", "<s>"),
    "tokenizer.json": ("huggingface", None),
    "tokenizer.json, BOS is EOS": ("huggingface", "</s>"),
    "tokenizer.json with BOS": ("huggingface", "<s>"),
}
OFTEN = ("sentencepiece", "tokenizer.json with BOS")


def sentencepiece_files(bos: str | None) -> dict[str, bytes]:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_id=2 if bos else -1,
        eos_id=1,
        unk_id=0,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return {"tokenizer.model": model.getvalue()}


def huggingface_files(bos: str | None) -> dict[str, bytes]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES, trainer)
    if bos == "<s>":
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    declared = {"eos_token": "</s>", **({"bos_token": bos} if bos else {})}
    return {
        "tokenizer.json": library.to_str().encode(),
        "tokenizer_config.json": json.dumps(declared).encode(),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in OFTEN else pytest.mark.exhaustive) for kind in KINDS],
)
def test_evaluation_finds_the_entropy_of_a_language(kind, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    documents = draw.sample([f"{s} {n:04}" for s in SENTENCES for n in range(10_000)], 16_000)
    for name, texts in (("train", documents[:-200]), ("valid", documents[-200:])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    (tmp_path / "tokenizer").mkdir()
    library, bos = KINDS[kind]
    files = sentencepiece_files(bos) if library == "sentencepiece" else huggingface_files(bos)
    for name, contents in files.items():
        (tmp_path / "tokenizer" / name).write_bytes(contents)
    command = (
        "--run run --data.sources train.jsonl --data.valid-sources valid.jsonl --data.store store "
        "--train.tokens 147456 --train.batch-tokens 1024 --optim.lr 1e-2 --optim.final-lr-ratio 0 "
        "--model.layers 1 --model.positions rope --model.vocab-size 384 --eval.every 0 "
        "--eval.sample-tokens 4 --checkpoint.every 144 --log.tensorboard False "
        "--tokenizer.path tokenizer --tokenizer.kind"
    )
    assert main.main(["train", str(REPO / "configs" / "debug.py"), *command.split(), library]) == 0
    capsys.readouterr()
    assert main.main(["eval", "run", "--text", "valid.jsonl", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["text_bits_per_byte"]
    assert measured == pytest.approx(BITS_PER_BYTE, rel=0.03)

    tokenizer = run_dir.open_run("run")[1]
    begun = tokenizer.prompt(SENTENCES[0])
    reader = store.Reader("store", "valid", store.read_manifest("store"))
    stream = reader.windows(np.array([0]), len(reader))[0].tolist()
    wanted = sum(text.startswith(SENTENCES[0]) for text in documents[-200:])
    assert sum(stream[i : i + len(begun)] == begun for i in range(len(stream))) == wanted > 9
    assert tokenizer.prompt("") == [stream[0]] == [tokenizer.prefix_id]


def test_a_store_of_before_has_eos_between_its_documents(tmp_path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_files("<s>")["tokenizer.model"])
    known = {"kind": "sentencepiece", "vocab_size": 320, "eos_id": 1, "sha256": ""}
    manifest = store.Manifest(known, {}, {}, "<u2", {})
    tokenizer = tokenizers.load(tmp_path, manifest.start_id)
    assert (tokenizer.bos_id, tokenizer.start_id, tokenizer.prompt("")) == (2, 1, [1])
    assert tokenizer.encode_documents(["", ""], [True, True]).tolist() == [1, 1]
    assert tokenizers.load(tmp_path).prompt("") == [2]  # an imported model's own convention
