"""Task files: the prompts made from their lines, and the errors of wrong lines."""

import hashlib
import json

import pytest

from gptjax.errors import ConfigError, DataError
from gptjax.evaluate import read_tasks, task_names
from gptjax.evaluate.formats import Cloze, MultipleChoice, Question

HELLASWAG = {
    "ind": 25,
    "activity_label": "Personal Care",
    "ctx_a": "[header] How to wash your hands [title] Wet them. [step] Use warm water.",
    "ctx_b": "then You",
    "ctx": "not read",
    "split": "val",
    "label": 1,
    "endings": ["[title] Run. [step] Fast.", "take  soap [substeps] and rub. "],
}
ARC = {
    "id": "q",
    "question": {
        "stem": "Which is red?",
        "choices": [{"text": "Venus", "label": "A"}, {"text": "Mars", "label": "B"}],
    },
    "answerKey": "B",
}
HUB_ARC = {
    "id": "q",
    "question": "Which is red?",
    "choices": {"text": ["Venus", "Mars"], "label": ["1", "2"]},
    "answerKey": "2",
}
SQUAD = {
    "id": "q",
    "title": "Paris",
    "context": "Paris lies on the Seine.",
    "question": "Where?",
    "answers": {"text": ["the Seine"], "answer_start": [14]},
}
NESTED = {
    "version": "v2.0",
    "data": [
        {
            "title": "Paris",
            "paragraphs": [
                {
                    "context": "Paris lies on the Seine.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "Where?",
                            "answers": [{"text": "the Seine", "answer_start": 14}],
                            "is_impossible": False,
                        },
                        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}
PROMPT = "Title: Paris\n\nBackground: Paris lies on the Seine.\n\nQuestion: {}\n\nAnswer:"


@pytest.fixture
def write(tmp_path):
    """Writes a task file of lines, objects or bytes, and returns its entry KIND:FILE."""

    def make(kind: str, *lines, name: str = "task.jsonl") -> str:
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in raw))
        return f"{kind}:{tmp_path / name}"

    return make


@pytest.mark.parametrize(
    ("kind", "record", "example"),
    [
        (
            "hellaswag",
            HELLASWAG,
            MultipleChoice(
                "Personal Care: How to wash your hands. Wet them. Use warm water. Then you",
                (" Run. Fast.", "take soap and rub."),
                1,
            ),
        ),
        (
            "hellaswag",
            HELLASWAG | {"ctx_a": "A man sits.", "ctx_b": "", "label": "0"},
            MultipleChoice("Personal Care: A man sits.", (" Run. Fast.", "take soap and rub."), 0),
        ),
        ("arc", ARC, MultipleChoice("Question: Which is red?\nAnswer:", ("Venus", "Mars"), 1)),
        ("arc", HUB_ARC, MultipleChoice("Question: Which is red?\nAnswer:", ("Venus", "Mars"), 1)),
        ("lambada", {"text": "a  dog\nand a cat"}, Cloze("a  dog\nand a", " cat")),
        ("squad", SQUAD, Question(PROMPT.format("Where?"), ("the Seine",))),
    ],
)
def test_line_becomes_an_example_with_the_prompt_of_lm_eval(kind, record, example, write) -> None:
    entry = write(kind, record)
    (file,) = read_tasks([entry])
    assert file.examples == (example,)
    assert (file.kind, file.path, file.total) == (kind, entry.partition(":")[2], 1)


def test_nested_squad_file_includes_unanswerable_questions(write) -> None:
    (file,) = read_tasks([write("squad", NESTED, name="dev-v2.0.json")])
    assert file.examples == (
        Question(PROMPT.format("Where?"), ("the Seine",)),
        Question(PROMPT.format("Why?"), ()),
    )


def test_limit_keeps_the_first_examples_and_counts_all(write, tmp_path) -> None:
    texts = [{"text": f"a word {i}"} for i in range(5)]
    (file,) = read_tasks([write("lambada", *texts)], 2)
    assert [one.continuation for one in file.examples] == [" 0", " 1"]
    assert file.total == 5
    raw = (tmp_path / "task.jsonl").read_bytes()
    assert file.sha256 == hashlib.sha256(raw).hexdigest()


LAMBADA = {"text": "a word"}


@pytest.mark.parametrize(
    ("kind", "lines", "message"),
    [
        ("lambada", [LAMBADA, b"", LAMBADA], ":2: is empty"),
        ("lambada", [LAMBADA, b"  "], ":2: is empty"),
        ("lambada", [LAMBADA, b"{"], ":2: is not JSON"),
        ("lambada", [b'{"text": "\xff x"}'], ":1: is not JSON"),
        ("lambada", [LAMBADA, b"[1]"], ":2: is a list; must be an object with 'text'"),
        ("lambada", [{"txt": "a b"}], ":1: has no 'text'; it has txt"),
        ("lambada", [{"text": 3}], ":1: text='3': must be a text"),
        ("lambada", [{"text": "one"}], ":1: text: must end with a space and the word"),
        ("lambada", [{"text": "a word "}], ":1: text: must end with a space and the word"),
        ("lambada", [], "no examples in it"),
        ("hellaswag", [HELLASWAG | {"label": ""}], ":1: label='': .* from 0 to 1"),
        ("hellaswag", [HELLASWAG, HELLASWAG | {"label": 2}], ":2: label=2: "),
        ("hellaswag", [HELLASWAG | {"endings": ["a"]}], ":1: endings: .* at least 2 texts"),
        ("hellaswag", [HELLASWAG | {"endings": "ab"}], ":1: endings='ab': must be a list"),
        ("arc", [ARC | {"answerKey": "C"}], ":1: answerKey='C': .* A, B"),
        ("arc", [{"question": "x"}], ":1: has no 'choices'"),
        ("arc", [HUB_ARC | {"choices": {"text": ["a"], "label": ["1", "2"]}}], ":1: choices: "),
        ("squad", [SQUAD | {"answers": {"text": [1]}}], ":1: text: must be a list of texts"),
        ("squad", [{k: v for k, v in SQUAD.items() if k != "title"}], ":1: has no 'title'"),
    ],
)
def test_wrong_line_is_reported_with_file_and_line(kind, lines, message, write) -> None:
    with pytest.raises(DataError, match=rf"task.jsonl{message}|task.jsonl: {message}"):
        read_tasks([write(kind, *lines)], 1)  # lines beyond the limit are checked as well


def test_wrong_entry_of_a_nested_file_is_reported_with_its_path(write) -> None:
    wrong = json.loads(json.dumps(NESTED))
    del wrong["data"][0]["paragraphs"][0]["qas"][1]["question"]
    place = r"x.json, data\[0\].paragraphs\[0\].qas\[1\]: has no 'question'"
    with pytest.raises(DataError, match=place):
        read_tasks([write("squad", wrong, name="x.json")])
    with pytest.raises(DataError, match=r"x.json:2: is not JSON"):
        read_tasks([write("squad", b'{"data":', b"nothing}", name="x.json")])
    with pytest.raises(DataError, match=r"x.json: has no 'data'"):
        read_tasks([write("squad", SQUAD, name="x.json")])


def test_invalid_entry_is_reported(write, tmp_path) -> None:
    good = write("arc", ARC)
    for entry, message in (
        ("hellaswag", "must be KIND:FILE"),
        ("arc:", "must be KIND:FILE"),
        ("helaswag:x.jsonl", "unknown kind 'helaswag'; known: arc, hellaswag, lambada, squad"),
    ):
        with pytest.raises(ConfigError, match=f"--task={entry}: {message}"):
            read_tasks([good, entry], option="--task")
    with pytest.raises(ConfigError, match="given twice"):
        read_tasks([good, good])
    with pytest.raises(DataError, match=r"eval.tasks=arc:.*absent: cannot be read: No such file"):
        read_tasks([f"arc:{tmp_path}/absent"])


def test_task_names_have_the_file_only_if_a_kind_repeats(write) -> None:
    entries = [write("arc", ARC, name=name) for name in ("Easy.jsonl", "Hard.jsonl")]
    files = read_tasks([*entries, write("lambada", LAMBADA)])
    assert task_names(files) == ["arc_Easy", "arc_Hard", "lambada"]
    assert task_names(files[1:]) == ["arc", "lambada"]
