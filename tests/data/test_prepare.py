"""Preparation of a store: documents and their EOS, splits, resuming, refused input."""

import concurrent.futures
import gc
import gzip
import json
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from gptjax import tokenizer as tokenizers
from gptjax.config import Config, DataConfig, ModelConfig, TokenizerConfig, to_dict
from gptjax.data import prepare, provenance, sources, store
from gptjax.data.journal import JOURNAL
from gptjax.data.split import share
from gptjax.errors import DataError, MismatchError, OutputError
from gptjax.runtime import file_lock
from gptjax.runtime.progress import Progress

WORDS = [a + b for a in ("ra", "tor", "lu", "mes", "po") for b in ("de", "cha", "bi", "sen", "")]
SENTENCEPIECE = TokenizerConfig(vocab_size=320)
BYTES = TokenizerConfig(kind="bytes")
HUGGINGFACE = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=320)
TOKENIZERS = [BYTES, SENTENCEPIECE, HUGGINGFACE]


def text(seed: int, lines: int = 30) -> str:
    rng = np.random.default_rng(seed)
    indented = (" " * 4 * rng.integers(3) + " ".join(rng.choice(WORDS, 7)) for _ in range(lines))
    return "\n".join(indented) + "\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Texts, records, blank and invalid ones, and a file that is long if 4000 bytes are."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(text(number))
    (folder / "blank.txt").write_text("\n \n")
    (folder / "invalid.txt").write_bytes(b"caf\xe9\n" * 9)
    (folder / "long.txt").write_text(text(99, lines=400))
    records = [{"text": text(n, 4)} for n in range(100, 120)] + [{"text": ""}]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def config(folder: Path, name: str = "store", tokenizer: TokenizerConfig = BYTES, **data) -> Config:
    """A configuration of the corpus in a folder, and a store beside it; fields of data as given."""
    fields = {"sources": (f"{folder}/corpus",), "workers": 1, "valid_fraction": 0.3, **data}
    return Config(
        model=ModelConfig(vocab_size=512),
        tokenizer=tokenizer,
        data=DataConfig(store=str(folder / name), **fields),
    )


@pytest.fixture
def here(monkeypatch) -> None:
    """Tokenizes in this process, since starting workers dominates the time of a small store."""

    class Here:
        """An executor that does its work when it is submitted."""

        def __init__(self, workers, context, start, arguments) -> None:
            tokenizer = tokenizers.load(*arguments)
            monkeypatch.setattr(prepare, "_worker_tokenizer", tokenizer, raising=False)

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            pass

        def submit(self, function, *arguments) -> concurrent.futures.Future:
            future = concurrent.futures.Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Here)


HERE = pytest.mark.usefixtures("here")


def contents(folder: str | Path) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tokens(cfg: Config, split: str) -> list[int]:
    reader = store.Reader(cfg.data.store, split, store.read_manifest(cfg.data.store))
    return reader.windows(np.array([0]), len(reader))[0].tolist()


def stored_documents(cfg: Config, split: str) -> list[str]:
    """The texts between the EOS tokens of a split, which opens and closes with one."""
    tokenizer = tokenizers.load(Path(cfg.data.store))
    first, *rest = tokens(cfg, split)
    assert first == rest[-1] == tokenizer.eos_id
    found, document = [], []
    for token in rest:
        if token == tokenizer.eos_id:
            found.append(tokenizer.decode(document))
            document = []
        else:
            document.append(token)
    return found


def source_documents(cfg: Config) -> dict[str, str]:
    """Whole texts by key, in the order of the sources."""
    whole: dict[str, str] = {}
    for source in sources.resolve(cfg.data.sources):
        for document in source.documents(cfg.data, sources.Counts()):
            whole[document.key] = whole.get(document.key, "") + document.text
    return whole


# --- what is in a store ----------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.kind)
def test_store_has_each_document_followed_by_eos(tmp_path, corpus, tokenizer) -> None:
    cfg = config(tmp_path, tokenizer=tokenizer)
    manifest = prepare.prepare(cfg)
    found = source_documents(cfg)
    wanted = {
        "train": [text for text in found.values() if share(text) >= cfg.data.valid_fraction],
        "valid": [text for text in found.values() if share(text) < cfg.data.valid_fraction],
    }
    assert min(map(len, wanted.values())) > 5
    for split, texts in wanted.items():
        assert stored_documents(cfg, split) == texts
        known = manifest.splits[split]
        assert known.documents == len(texts)
        assert known.bytes == sum(len(text.encode()) for text in texts)
        assert known.tokens == len(tokens(cfg, split))
    assert manifest.counts == asdict(sources.Counts(empty=2, replaced_utf8=1))
    own = tokenizers.load(Path(cfg.data.store))
    assert manifest.tokenizer["sha256"] == own.fingerprint
    assert manifest.tokenizer["eos_id"] == own.eos_id
    assert list(store.verify(cfg.data.store)) == []


@HERE
@pytest.mark.parametrize("link", [False, True])
def test_a_validation_file_is_not_trained_on(tmp_path: Path, link: bool) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b", "valid"):
        (texts / f"{name}.txt").write_text(f"the text of {name}\n")
    held_out = texts / "valid.txt"
    if link:
        held_out = tmp_path / "elsewhere.txt"
        held_out.symlink_to(texts / "valid.txt")
    cfg = config(tmp_path, sources=(f"{texts}/*.txt",), valid_sources=(str(held_out),))
    said: list[str] = []
    prepare.prepare(cfg, say=said.append)
    assert stored_documents(cfg, "train") == ["the text of a\n", "the text of b\n"]
    assert stored_documents(cfg, "valid") == ["the text of valid\n"]
    assert said == ["1 of the sources' files are in data.valid_sources: not trained on"]
    only = config(tmp_path, "only", sources=(str(held_out),), valid_sources=(str(held_out),))
    with pytest.raises(DataError, match="no text to train on"):
        prepare.prepare(only)


def test_a_store_of_before_a_field_existed_is_used(tmp_path: Path, corpus) -> None:
    cfg = config(tmp_path)
    wanted = prepare.prepare(cfg)
    file = Path(cfg.data.store, store.MANIFEST)
    saved = json.loads(file.read_text())
    del saved["data"]["bad_records"]
    file.write_text(json.dumps(saved))
    assert prepare.prepare(cfg).fingerprint() == wanted.fingerprint()
    with pytest.raises(MismatchError, match="bad_records: 'refuse' in the store, 'skip' given"):
        prepare.prepare(config(tmp_path, bad_records="skip"))


@HERE
@pytest.mark.parametrize("tokenizer", [BYTES, SENTENCEPIECE], ids=lambda t: t.kind)
def test_long_file_read_in_parts_is_one_document(tmp_path, corpus, tokenizer) -> None:
    cfg = config(tmp_path, "whole", tokenizer)
    whole = prepare.prepare(cfg)
    same = replace(tokenizer, path="" if tokenizer == BYTES else cfg.data.store)
    cut = config(tmp_path, "cut", same, max_document_bytes=4000)
    manifest = prepare.prepare(cut)
    assert manifest.counts["split_documents"] == 1
    assert manifest.splits == whole.splits
    assert manifest.fingerprint() == whole.fingerprint()


@HERE
def test_validation_sources_become_the_whole_validation_split(tmp_path: Path, corpus: Path) -> None:
    cfg = config(
        tmp_path,
        sources=(f"{corpus}/0[0-4].txt",),
        valid_sources=(f"{corpus}/0[5-6].txt", f"{corpus}/11.txt"),
    )
    prepare.prepare(cfg)
    assert stored_documents(cfg, "train") == [text(n) for n in range(5)]
    assert stored_documents(cfg, "valid") == [text(n) for n in (5, 6, 11)]


@HERE
def test_added_files_do_not_change_the_split_of_other_files(tmp_path: Path, corpus: Path) -> None:
    before, after = config(tmp_path, "before"), config(tmp_path, "after")
    prepare.prepare(before)
    for number in range(30):
        (corpus / f"0{number}-added.txt").write_text(text(1000 + number))
    prepare.prepare(after)
    for split in ("train", "valid"):
        added = [
            d for d in stored_documents(after, split) if d not in stored_documents(before, split)
        ]
        old = [d for d in stored_documents(after, split) if d not in added]
        assert added
        assert old == stored_documents(before, split)


@HERE
def test_tokenizer_is_not_trained_on_held_out_documents(tmp_path: Path, corpus: Path) -> None:
    made = {}
    held_out = [p for p in corpus.glob("??.txt") if share(p.read_text()) < 0.3]
    assert held_out
    for name in ("before", "after"):
        made[name] = prepare.prepare(config(tmp_path, name, SENTENCEPIECE))
        for file in held_out:
            strange = (f"altogether different things are said here {n}\n" * 200 for n in range(99))
            file.write_text(next(text for text in strange if share(text) < 0.3))
    assert made["before"].tokenizer == made["after"].tokenizer
    assert made["before"].splits["train"] == made["after"].splits["train"]
    assert made["before"].splits["valid"] != made["after"].splits["valid"]


def test_store_does_not_depend_on_the_number_of_workers(tmp_path, corpus, monkeypatch) -> None:
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1500)
    made = {workers: config(tmp_path, f"{workers}", workers=workers) for workers in (1, 2)}
    for cfg in made.values():
        prepare.prepare(cfg)
    one, two = (contents(cfg.data.store) for cfg in made.values())
    assert one == two
    assert {"manifest.json", "tokenizer.bytes", "train/c/0", "valid/c/0"} < set(one)


@HERE
def test_finished_store_is_reused(tmp_path: Path, corpus: Path) -> None:
    cfg = config(tmp_path)
    manifest = prepare.prepare(cfg)
    before = contents(cfg.data.store)
    for file in corpus.iterdir():
        file.unlink()
    other = replace(cfg.data, workers=2, prefetch=3, documents="mask")  # make no other store
    clock: list[tuple[int, float]] = []
    again = prepare.prepare(replace(cfg, data=other), clock=lambda *done: clock.append(done))
    assert again == manifest
    assert clock == []
    assert contents(cfg.data.store) == before


# --- interruptions ---------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt(cfg: Config, monkeypatch, after: int) -> dict:
    """Interrupts a preparation after so many batches; returns the journal that is left."""
    in_order = prepare._in_order

    def broken(*args) -> Iterator:
        for number, encoded in enumerate(in_order(*args)):
            if number == after:
                raise Interrupted
            yield encoded

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_in_order", broken)
        with pytest.raises(Interrupted):
            prepare.prepare(cfg)
    gc.collect()  # closes what the exception's frames hold open, as the end of a process would
    assert not Path(cfg.data.store, store.MANIFEST).exists()
    return json.loads(Path(cfg.data.store, JOURNAL).read_text())["progress"]


@HERE
@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, *(pytest.param(t, marks=pytest.mark.slow) for t in (SENTENCEPIECE, HUGGINGFACE))],
    ids=lambda t: t.kind,
)
def test_interrupted_preparation_continues_to_identical_bytes(
    tmp_path: Path, corpus: Path, monkeypatch, tokenizer: TokenizerConfig
) -> None:
    whole = config(tmp_path, "whole", tokenizer, max_document_bytes=4000)
    manifest = prepare.prepare(whole)
    counted = ("empty", "replaced_utf8", "split_documents")
    # Of each kind there is one that could be counted twice.
    assert min(manifest.counts[kind] for kind in counted) >= 1
    cut = config(tmp_path, "cut", tokenizer, max_document_bytes=4000)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1500)
    monkeypatch.setattr(prepare, "_JOURNAL_BYTES", 4000)
    done = [interrupt(cut, monkeypatch, after)["documents"] for after in (6, 0, 4)]
    assert 0 < done[0] == done[1] < done[2]
    before = json.loads(Path(cut.data.store, JOURNAL).read_text())["progress"]["bytes"]
    Path(cut.data.store, ".journal.json.partial").write_text('{"ident')  # killed as it was written
    monkeypatch.undo()  # goes on in other processes, and in batches of another size
    clock: list[tuple[int, float]] = []
    assert prepare.prepare(cut, clock=lambda *done: clock.append(done)) == manifest
    ((size, seconds),) = clock  # of what was done now
    assert size == sum(s.bytes for s in manifest.splits.values()) - sum(before.values())
    assert seconds > 0
    assert contents(cut.data.store) == contents(whole.data.store)


@HERE
def test_interruption_within_a_long_file_keeps_it_one_document(
    tmp_path: Path, corpus: Path, monkeypatch
) -> None:
    only = {"sources": (f"{corpus}/long.txt",), "valid_sources": (f"{corpus}/00.txt",)}
    cut = config(tmp_path, max_document_bytes=4000, **only)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1)
    monkeypatch.setattr(prepare, "_JOURNAL_BYTES", 1)
    journal = interrupt(cut, monkeypatch, 2)
    assert (journal["documents"], journal["split_documents"]["train"]) == (2, 0)
    manifest = prepare.prepare(cut)
    assert stored_documents(cut, "train") == [text(99, lines=400)]
    assert manifest.splits["train"].documents == 1


@HERE
def test_unfinished_store_of_other_files_is_refused(tmp_path, corpus, monkeypatch) -> None:
    cfg = config(tmp_path)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1500)
    monkeypatch.setattr(prepare, "_JOURNAL_BYTES", 4000)
    assert interrupt(cfg, monkeypatch, 8)["documents"]
    before = contents(cfg.data.store)
    added = corpus / "000.txt"
    added.write_text("a document more, which shifts all others")
    with pytest.raises(MismatchError, match=r"unfinished.*the sources have changed"):
        prepare.prepare(cfg)
    added.unlink()
    (corpus / "00.txt").write_text("one that has changed")
    with pytest.raises(MismatchError, match=r"unfinished.*the sources have changed"):
        prepare.prepare(cfg)
    (corpus / "00.txt").write_text(text(0))
    kept = {name: raw for name, raw in before.items() if name != "prepare.lock"}
    assert kept.items() <= contents(cfg.data.store).items()
    assert prepare.prepare(cfg).splits["train"].documents > 5


@HERE
def test_after_a_bad_record_the_finished_sources_are_kept(
    tmp_path: Path, corpus: Path, monkeypatch
) -> None:
    bad = corpus / "06.jsonl"
    good = "".join(json.dumps({"text": text(200 + n, 9)}) + "\n" for n in range(6))
    bad.write_text(good + '{"text": null}\n')
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1500)
    cfg = config(tmp_path)
    with pytest.raises(DataError, match=r"06.jsonl:7: its field 'text' is null and no text"):
        prepare.prepare(cfg)
    bad.write_text(good)
    said: list[str] = []
    read: list[str] = []
    encode = prepare._encode
    monkeypatch.setattr(
        prepare,
        "_encode",
        lambda batch, *rest: (read.extend(t for _, t, _ in batch), encode(batch, *rest))[1],
    )
    manifest = prepare.prepare(cfg, say=said.append)
    assert said == ["sources have changed; goes on after the first 6, which are as they were"]
    assert read[:6] == [text(200 + n, 9) for n in range(6)]
    assert not {text(n) for n in range(6)} & set(read)
    assert prepare.prepare(config(tmp_path, "again")).splits == manifest.splits


@HERE
def test_text_that_changed_at_equal_size_is_not_mixed_with_what_it_was(
    tmp_path, corpus, monkeypatch
) -> None:
    """Neither where a preparation was interrupted, nor while one reads."""
    cfg = config(tmp_path)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1500)
    monkeypatch.setattr(prepare, "_JOURNAL_BYTES", 4000)
    interrupt(cfg, monkeypatch, 8)
    first = min(corpus.glob("*.txt"))
    kept = first.read_bytes()
    first.write_bytes(kept[:-9] + bytes(9 * [ord("z")]))
    with pytest.raises(MismatchError, match="documents is not what it was when they were token"):
        prepare.prepare(cfg)
    first.write_bytes(kept)
    made = prepare.prepare(cfg)
    assert made.splits == prepare.prepare(config(tmp_path, "whole")).splits

    encode = prepare._encode

    def meanwhile(*args):
        first.write_bytes(kept[::-1])
        return encode(*args)

    monkeypatch.setattr(prepare, "_encode", meanwhile)
    with pytest.raises(DataError, match=f"{first.name}: written to while the text was prepared"):
        prepare.prepare(config(tmp_path, "third"))
    assert not Path(config(tmp_path, "third").data.store, "manifest.json").exists()


@HERE
def test_missing_written_tokens_are_detected(tmp_path, corpus, monkeypatch) -> None:
    cfg = config(tmp_path)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1500)
    monkeypatch.setattr(prepare, "_JOURNAL_BYTES", 4000)
    interrupt(cfg, monkeypatch, 8)
    file = Path(cfg.data.store, "train", "c", "0")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=f"{file}: shorter than the journal says"):
        prepare.prepare(cfg)


@HERE
def test_tokens_are_synced_to_disk_before_the_journal(tmp_path, corpus, monkeypatch) -> None:
    cfg = config(tmp_path, tokenizer=SENTENCEPIECE)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1500)
    monkeypatch.setattr(prepare, "_JOURNAL_BYTES", 4000)
    folder, synced, said = Path(cfg.data.store), {}, []
    sync, replace_file = store.sync, store.replace_file

    def noted(path: str | Path) -> None:
        sync(path)
        synced[Path(path)] = Path(path).stat().st_size

    def checked(path: Path, text: str) -> None:
        if path.name == JOURNAL and (journal := json.loads(text)["progress"])["documents"]:
            said.append(journal)
            wanted = {folder / s / "c" / "0": 2 * n for s, n in journal["tokens"].items()}
            wanted[folder / "tokenizer.model"] = (folder / "tokenizer.model").stat().st_size
            assert {file: synced.get(file) for file in wanted} == wanted
            assert {folder / s / part for s in ("train", "valid") for part in (".", "c")} < set(
                synced
            )
        replace_file(path, text)
        assert synced[path.with_name(f".{path.name}.partial")] == len(text)

    monkeypatch.setattr(store, "sync", noted)
    monkeypatch.setattr(store, "replace_file", checked)
    prepare.prepare(cfg)
    assert len(said) > 2
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "prepare.lock"]
    for file in files:
        replaced = file.name in (store.MANIFEST, provenance.SOURCES)
        here = file.with_name(f".{file.name}.partial") if replaced else file
        assert synced[here] == file.stat().st_size


@HERE
def test_partial_journal_is_written_again(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / ".journal.json.partial").write_text('{"ident')
    assert prepare.prepare(config(tmp_path)).splits["train"].documents > 5
    assert not [path for path in folder.rglob("*") if "journal" in path.name]


@HERE
def test_damaged_journal_is_reported(tmp_path: Path, corpus: Path, monkeypatch) -> None:
    cfg = config(tmp_path)
    interrupt(cfg, monkeypatch, 0)
    file = Path(cfg.data.store, JOURNAL)
    for damaged in ("", "{}", file.read_text()[:50]):
        file.write_text(damaged)
        with pytest.raises(DataError, match=f"{file}: is damaged"):
            prepare.prepare(cfg)


# Prints its progress, so that it can be killed at a chosen point.
CHILD = """
import json, sys
from gptjax import config
from gptjax.data import prepare
if __name__ == "__main__":
    prepare._BATCH_BYTES = prepare._JOURNAL_BYTES = 1500
    prepare.prepare(config.load(sys.argv[1]), lambda phase, done, of: print(done, flush=True))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_killed_preparation_continues_and_leaves_no_worker_behind(tmp_path, corpus) -> None:
    for number in range(12, 60):
        (corpus / f"{number}.txt").write_text(text(number))
    cut, whole = config(tmp_path, "cut", workers=2), config(tmp_path, "whole")
    prepare.prepare(whole)
    size = sum(split.bytes for split in store.read_manifest(whole.data.store).splits.values())
    file, child = tmp_path / "cut.json", tmp_path / "child.py"
    file.write_text(json.dumps(to_dict(cut)))
    child.write_text(CHILD)
    for part in (0.1, 0.5, 0.9):
        process = subprocess.Popen(
            [sys.executable, child, file], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert any(int(line) >= part * size for line in process.stdout)
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        assert len(children) >= 2
        for _ in range(600):
            if not any(map(alive, children)):
                break
            time.sleep(0.05)
        assert not any(map(alive, children))
        journal = json.loads(Path(cut.data.store, JOURNAL).read_text())
        assert journal["progress"]["documents"] > 0
    prepare.prepare(cut)
    assert contents(cut.data.store) == contents(whole.data.store)


@HERE
def test_preparation_waits_while_another_process_prepares_the_store(tmp_path, corpus) -> None:
    cfg = config(tmp_path)
    folder = Path(cfg.data.store)
    folder.mkdir()
    said: queue.Queue[str] = queue.Queue()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with file_lock.held(folder / "prepare.lock", "another"):
            waiting = pool.submit(prepare.prepare, cfg, say=said.put)
            line = said.get(timeout=60)
            assert line.startswith(f"data.store={folder}: in use by process ")
            assert set(contents(folder)) == {"prepare.lock"}
            assert not waiting.done()
            made = config(tmp_path, "made")
            manifest = prepare.prepare(made)
            for file in Path(made.data.store).iterdir():  # as if the other one had made it
                if file.name != "prepare.lock":
                    file.rename(folder / file.name)
            before = contents(folder)
        assert waiting.result(timeout=60) == manifest
    assert {**contents(folder), "prepare.lock": b""} == {**before, "prepare.lock": b""}


# --- what is refused -------------------------------------------------------------------------


@HERE
def test_store_of_other_data_is_refused_finished_or_not(tmp_path, corpus, monkeypatch) -> None:
    made, half = config(tmp_path, "made"), config(tmp_path, "half")
    prepare.prepare(made)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1500)
    monkeypatch.setattr(prepare, "_JOURNAL_BYTES", 4000)
    assert interrupt(half, monkeypatch, 8)["documents"]
    for cfg in (made, half):
        before = contents(cfg.data.store)
        other = replace(cfg, data=replace(cfg.data, valid_fraction=0.4, bad_utf8="fail"))
        with pytest.raises(MismatchError) as caught:
            prepare.prepare(other)
        assert cfg.data.store in str(caught.value)
        assert sorted(caught.value.differences) == [
            "bad_utf8: 'replace' in the store, 'fail' given",
            "valid_fraction: 0.3 in the store, 0.4 given",
        ]
        with pytest.raises(MismatchError, match="tokenizer"):
            prepare.prepare(replace(cfg, tokenizer=SENTENCEPIECE))
        assert contents(cfg.data.store) == before


@HERE
def test_failed_preparation_without_output_does_not_fix_the_configuration(
    tmp_path: Path, corpus: Path
) -> None:
    """A first attempt that wrote no tokens may be followed by one with other settings."""
    file = corpus / "records.jsonl"
    cfg = config(tmp_path, tokenizer=SENTENCEPIECE, sources=(str(file),))
    file.write_text(file.read_text().replace('"text"', '"body"'))
    with pytest.raises(DataError, match=f"{file}:1: .*set data.text_field"):
        prepare.prepare(cfg)
    mended = config(tmp_path, sources=(str(file),), text_field="body")
    assert prepare.prepare(mended).tokenizer["kind"] == "bytes"
    assert len(stored_documents(mended, "train") + stored_documents(mended, "valid")) == 20
    assert set(contents(cfg.data.store)) == {
        "manifest.json",
        "sources.json",
        "tokenizer.bytes",
        "prepare.lock",
        *(
            f"{split}/{file}"
            for split in ("train", "valid")
            for file in ("zarr.json", "crc32", "c/0")
        ),
    }


@HERE
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"sources": ("blank.txt",)}, "data.sources={}/blank.txt: no text to train on"),
        ({"valid_sources": ("blank.txt",)}, "data.valid_sources={}/blank.txt: no text"),
        ({"sources": ("twice.jsonl",)}, "data.sources={}/twice.jsonl: all its documents are the"),
        (
            {"sources": ("00.txt",), "valid_sources": ("same.txt",)},
            "data.sources={}/00.txt: no text to train on that is not in data.valid_sources too",
        ),
    ],
)
def test_empty_split_is_reported_and_leaves_no_files(
    tmp_path: Path, corpus: Path, fields: dict, wanted: str
) -> None:
    (corpus / "twice.jsonl").write_text('{"text": "twice"}\n' * 2)
    (corpus / "same.txt").write_text(text(0))
    given = {
        name: tuple(f"{corpus}/{file}" for file in value) if isinstance(value, tuple) else value
        for name, value in fields.items()
    }
    with pytest.raises(DataError) as caught:
        prepare.prepare(config(tmp_path, **given))
    assert str(caught.value).startswith(wanted.format(corpus))
    assert [path.name for path in Path(tmp_path, "store").iterdir()] == ["prepare.lock"]
    assert prepare.prepare(config(tmp_path)).splits["train"].documents > 5


@HERE
def test_folder_with_other_files_is_refused_unchanged(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "store"
    (folder / "train").mkdir(parents=True)
    (folder / "notes.md").write_text("kept")
    (folder / "train" / "poem.txt").write_text("kept")
    with pytest.raises(
        OutputError, match=rf"data\.store={folder}: contains other files \(notes\.md"
    ):
        prepare.prepare(config(tmp_path))
    kept = {"notes.md": b"kept", "train/poem.txt": b"kept"}
    assert {**contents(folder), "prepare.lock": b""} == {**kept, "prepare.lock": b""}


@HERE
def test_tokenizer_larger_than_the_model_vocabulary_is_refused(
    tmp_path: Path, corpus: Path
) -> None:
    cfg = config(tmp_path, tokenizer=SENTENCEPIECE)
    small = replace(cfg, model=replace(cfg.model, vocab_size=300))
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"model\.vocab_size=300: smaller than the tokenizer's 320"
        ):
            prepare.prepare(small)
    assert prepare.prepare(cfg).tokenizer["vocab_size"] == 320


@HERE
def test_unwritable_store_is_reported(tmp_path: Path, corpus: Path) -> None:
    cfg = config(tmp_path, "corpus/00.txt/store")
    with pytest.raises(OutputError, match=f"data.store={cfg.data.store}: cannot be written"):
        prepare.prepare(cfg)


@HERE
def test_unreadable_source_is_reported_by_its_own_path(tmp_path, corpus) -> None:
    raw = gzip.compress(text(5).encode())
    (corpus / "cut.txt.gz").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=f"{corpus}/cut.txt.gz: cannot be read"):
        prepare.prepare(config(tmp_path))


# --- progress --------------------------------------------------------------------------------


@HERE
def test_each_phase_reports_its_progress_in_bytes(tmp_path: Path, corpus: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    manifest = prepare.prepare(
        config(tmp_path, tokenizer=SENTENCEPIECE), lambda *words: told.append(words)
    )
    assert list(dict.fromkeys(phase for phase, _, _ in told)) == ["tokenizer", "tokenize"]
    done = [done for phase, done, _ in told if phase == "tokenize"]
    assert done == sorted(done)
    assert done[-1] == sum(split.bytes for split in manifest.splits.values())
    expected = {of for phase, _, of in told if phase == "tokenize"}
    assert expected == {sum(p.stat().st_size for p in corpus.iterdir())}


def test_each_phase_has_a_progress_bar(capsys) -> None:
    with prepare.shown(Progress()) as tell:
        tell("tokenizer", 500, 1000)
        tell("tokenizer", 1000, 1000)
        tell("tokenize", 2000, 2000)
    written = capsys.readouterr().err.rstrip("\n").split("\n")
    lines = [line.rpartition("\r")[2] for line in written]  # as a terminal leaves them
    assert [line.partition(":")[0] for line in lines] == ["tokenizer", "tokenize"]
    assert "100%" in lines[0]
    assert "1.00k/1.00k" in lines[0]
