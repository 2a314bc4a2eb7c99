"""Task metrics against plain numpy and their definitions."""

import math

import numpy as np
import pytest
from plain_model import greedy, score

from gptjax.evaluate import TaskEvaluator, TaskFile, answers
from gptjax.evaluate.formats import Cloze, MultipleChoice, Question
from gptjax.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENIZER = ByteTokenizer()


@pytest.fixture
def measure(byte_params, byte_model, put, scorer, on_mesh):
    """Measures the tiny model on examples."""

    def run(*examples, mesh=(1,), rows=4, params=byte_params):
        file = TaskFile("kind", "file", "", examples, len(examples))
        with on_mesh(*mesh):
            task = TaskEvaluator(file, TOKENIZER, scorer(rows), "it")
            return task.run(put(params, byte_model))

    return run


@pytest.fixture(scope="module")
def choices(byte_params, byte_model) -> list[tuple[MultipleChoice, np.ndarray]]:
    """Multiple-choice examples with choices of many lengths, and their log-likelihoods by numpy."""
    rng = np.random.default_rng(3)
    letters = list("abcdefgh äöü€")
    word = lambda n: "x" + "".join(rng.choice(letters, n))
    made = []
    for number in range(12):
        one = MultipleChoice(word(12), tuple(word(n) for n in (2, 4, 7)), number % 3)
        ids = [256, *one.context.rstrip().encode()]
        spaces = " " * (len(one.context) - len(one.context.rstrip()))
        texts = [f"{spaces} {text}".encode() for text in one.choices]
        made.append((one, np.array([score(byte_params, byte_model, ids, t)[0] for t in texts])))
    return made


@pytest.mark.parametrize(
    ("mesh", "rows"), [((1,), 5), pytest.param((2, 2, 2), 4, marks=pytest.mark.slow)], ids=str
)
def test_acc_compares_log_likelihoods_and_acc_norm_those_per_character(
    mesh, rows, choices, measure
) -> None:
    right = {"acc": [], "acc_norm": [], "bytes": []}
    for one, logprobs in choices:
        by = {"acc": 1, "acc_norm": [len(t) for t in one.choices]}
        by["bytes"] = [len(t.encode()) for t in one.choices]
        for name, lengths in by.items():
            right[name].append((logprobs / lengths).argmax() == one.gold)
    assert len({tuple(values) for values in right.values()}) == 3  # all normalizations differ
    measured = measure(*(one for one, _ in choices), mesh=mesh, rows=rows)
    assert measured == {
        "it_acc": np.mean(right["acc"]),
        "it_acc_norm": np.mean(right["acc_norm"]),
        "it_cut": 0,
    }


@pytest.mark.slow
def test_cloze_is_right_if_every_token_is_the_likeliest(byte_params, byte_model, measure) -> None:
    examples, nats = [], []
    for context in ("ab", "the quick brown", "x"):
        ids = [256, *context.encode()]
        for wrong in (0, 1):
            text = f" {'yz'[wrong]}"
            examples.append(Cloze(context, text))
            nats.append(-score(byte_params, byte_model, ids, text.encode())[0])
    measured = measure(*examples)
    assert measured["it_acc"] == 0
    assert measured["it_perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    # After this many bytes the likeliest next ones are ASCII, so they can be asked for in text.
    found = []
    for number in range(200):
        context = f"n{number}"
        ids = greedy(byte_params, byte_model, [256, *context.encode()], 1)
        if ids[0] < 128 and chr(ids[0]).isalnum():
            found.append(Cloze(context, chr(ids[0])))
        if len(found) == 2:
            break
    assert measure(*found, examples[0])["it_acc"] == pytest.approx(2 / 3)


def test_answer_is_the_greedy_continuation_up_to_the_end_of_line(
    byte_params, byte_model, measure
) -> None:
    examples = []
    for prompt in ("a question", "another", "what is this?"):
        ids = greedy(byte_params, byte_model, [256, *prompt.encode()], 32)  # half of the context
        ids = ids[: next((i for i, token in enumerate(ids) if token in (10, 256)), 32)]
        examples.append(Question(prompt, (TOKENIZER.decode(ids),)))
    assert all(answers.normalize(one.answers[0]) for one in examples)
    wrong = Question("a question", ("no such answer",))
    measured = measure(*examples, wrong, Question("a question", ()))
    assert measured == {"it_exact_match": 3 / 5, "it_f1": 3 / 5, "it_cut": 0}


@pytest.mark.slow
def test_text_after_the_answers_line_is_dropped(byte_params, byte_model, measure) -> None:
    for number in range(100):  # one that is not continued by a single token again and again
        prompt = f"question {number}"
        ids = greedy(byte_params, byte_model, [256, *prompt.encode()], 8)
        new = [i for i in range(1, 8) if ids[i] not in [*prompt.encode(), *ids[:i]]]
        if new:
            break
    at = new[0]
    # The same model, in which a line's end has changed places with one of these tokens.
    embed = byte_params["embed"].copy()
    embed[[10, ids[at]]] = embed[[ids[at], 10]]
    answer = TOKENIZER.decode(ids[:at])
    assert answers.normalize(answer)
    assert 10 not in [*prompt.encode(), *ids]
    examples = Question(prompt, (answer,)), Question(prompt, (TOKENIZER.decode(ids),))
    measured = measure(*examples, params=byte_params | {"embed": embed})
    assert measured["it_exact_match"] == 1 / 2


@pytest.mark.slow
def test_truncated_examples_are_counted(measure) -> None:
    long, short = "x" * 80, "x"
    assert (
        measure(MultipleChoice(long, ("a", "b"), 0), MultipleChoice(short, ("a", "b"), 0))["it_cut"]
        == 1
    )
    assert measure(Cloze(long, " a"), Cloze(short, " a"))["it_cut"] == 1
    assert measure(Question("x" * 32, ("a",)), Question("x" * 31, ("a",)))["it_cut"] == 1


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        (" The Seine.", ["Seine"], 1, 1),
        ("An apple a day", ["apple day"], 1, 1),
        ("on the Seine river", ["the Seine"], 0, 0.5),  # 1 of 3, 1 of 1
        ("Seine", ["Rhine", "river Seine"], 0, 2 / 3),  # the best of them
        ("a b b", ["b b b"], 0, 0.8),  # 2 of 2 (an article is none), 2 of 3
        ("theatre", ["atre"], 0, 0),
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("x-ray's", ["xrays"], 1, 1),
    ],
)
def test_exact_match_and_f1_are_those_of_squad(answer, references, exact, f1) -> None:
    assert answers.exact_match(answer, references) == exact
    assert answers.f1(answer, references) == pytest.approx(f1)
