"""Labelled examples: reading them, and the errors of wrong lines."""

import pytest

from gptjax.errors import DataError
from gptjax.finetune import examples

GOOD = {"text": "a", "label": "x"}
CHOICE = {"text": "a", "choices": ["b", "c"], "label": 1}


def problem(path, task: str) -> str:
    with pytest.raises(DataError) as caught:
        examples.read(str(path), task, "--data")
    assert caught.value.exit_code == 65
    return str(caught.value)


def test_texts_pairs_and_labels_of_either_kind_are_read(write) -> None:
    file = write("a.jsonl", [GOOD, {"text": "a", "pair": "b", "label": 3}])
    read = examples.read(str(file), "classify", "--data")
    assert [(one.sequences, one.label, one.line) for one in read.all] == [
        ((("a",),), "x", 1),
        ((("a", "b"),), "3", 2),
    ]


def test_each_choice_is_a_sequence_with_the_text(write) -> None:
    read = examples.read(str(write("a.jsonl", [CHOICE])), "choose", "--data")
    assert read.all[0].sequences == (("a", "b"), ("a", "c"))
    assert read.all[0].label == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "is empty"),
        ("{", "is not JSON"),
        ("[]", "is a list; must be an object with 'text'"),
        ({"label": "x"}, "has no 'text'; it has label"),
        ({"text": " ", "label": "x"}, "text: is empty"),
        ({"text": 3, "label": "x"}, "text='3': must be a text"),
        ({"text": "a", "pair": "", "label": "x"}, "pair: is empty"),
        ({"text": "a"}, "has no 'label'; it has text"),
        ({"text": "a", "label": ""}, "label='': must be"),
        ({"text": "a", "label": True}, "label='True': must be"),
        ({"text": "a", "label": 0.5}, "label='0.5': must be"),
        ({"text": "a", "label": None}, "label='None': must be"),
    ],
)
def test_wrong_line_is_reported_with_file_and_line(write, line, expected: str) -> None:
    file = write("wrong.jsonl", [GOOD, line, GOOD])
    message = problem(file, "classify")
    assert message.startswith(f"{file}:2: {expected}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"choices": ["b"]}, "choices: must be a list of at least two"),
        ({"choices": ["b", " "]}, "choices: each must be a text that is not empty"),
        ({"label": 2}, "label='2': must be the index of a choice, from 0 to 1"),
        ({"label": -1}, "label='-1': must be"),
        ({"label": True}, "label='True': must be"),
        ({"text": ""}, "text: is empty"),
    ],
)
def test_wrong_choices_are_reported(write, change, expected: str) -> None:
    file = write("wrong.jsonl", [CHOICE | change])
    assert problem(file, "choose").startswith(f"{file}:1: {expected}")


def test_all_wrong_lines_are_reported_up_to_twenty(write) -> None:
    message = problem(write("wrong.jsonl", ["{"] * 25), "classify")
    assert [line.split(":")[1] for line in message.splitlines()[:20]] == [
        str(i + 1) for i in range(20)
    ]
    assert message.endswith("and 5 more")


def test_empty_and_missing_files_are_errors(write) -> None:
    assert problem(write("none.jsonl", []), "classify").endswith("no examples in it")
    assert "cannot be read: No such file" in problem("/nowhere.jsonl", "classify")


def test_labels_are_ignored_when_reading_unlabelled(write) -> None:
    file = write("new.jsonl", [{"text": "a"}, {"text": "a", "label": [1]}])
    read = examples.read(str(file), "classify", "--file", labelled=False)
    assert [one.label for one in read.all] == [None, None]


def sets(write, train, valid):
    read = lambda name, labels: examples.read(
        str(write(name, [{"text": "a", "label": label} for label in labels])), "classify", "--data"
    )
    return read("train.jsonl", train), read("valid.jsonl", valid)


def test_labels_are_sorted_as_numbers_or_as_texts(write) -> None:
    assert examples.labels_of(*sets(write, [10, 9, -1], [9])) == ("-1", "9", "10")
    assert examples.labels_of(*sets(write, ["b", "10", "9"], ["b"])) == ("10", "9", "b")


def test_unknown_validation_label_is_reported(write) -> None:
    train, valid = sets(write, ["a", "b"], ["a", "c"])
    with pytest.raises(
        DataError, match=r"valid.jsonl:2: label='c': not in the training .* are a, b$"
    ):
        examples.labels_of(train, valid)


def test_single_label_is_an_error(write) -> None:
    with pytest.raises(DataError, match="every label is 'a'"):
        examples.labels_of(*sets(write, ["a", "a"], ["a"]))
