"""Facts are read from JSON lines and become the tokens used in training."""

import json

import numpy as np
import pytest

from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import DataError
from memjax.knowledge.facts import Fact, batch_of, check_answers, pairs_of, read_facts, windows


def write(tmp_path, *lines) -> str:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_texts_prompts_and_paraphrases_are_read(tmp_path):
    lines = [
        {"text": "Ann is a dentist.", "paraphrases": ["The job of Ann: dentist."]},
        {"prompt": "Ann's job?", "answer": "dentist", "paraphrases": ["Ann works as a", "Ann is a "]},
    ]
    told, asked = read_facts(write(tmp_path, *lines), "FACTS")
    assert [[segment.text for segment in record] for record in told.wordings] == [
        ["Ann is a dentist."],
        ["The job of Ann: dentist."],
    ]
    assert told.question is None
    assert asked.question == asked.wordings[0]
    assert ["".join(segment.text for segment in record) for record in asked.wordings] == [
        "Ann's job? dentist",
        "Ann works as a dentist",
        "Ann is a dentist",
    ]
    assert [segment.learned for segment in asked.wordings[2]] == [False, True]
    assert [fact.fields() for fact in (told, asked)] == lines
    assert [Fact.of_fields(line) for line in lines] == [told, asked]


def test_a_prompt_has_one_answer_in_all_wordings_and_a_text_has_none():
    facts = [Fact.of_fields({"prompt": "Who?", "answer": "Ann", "paraphrases": ["Whose?"]})]
    facts += [Fact.of_fields({"text": text}) for text in ("Who?", "Whose?", "Ann")]
    check_answers([*facts, *facts])
    with pytest.raises(DataError, match=r"the prompt 'Whose\?' has two answers, 'Ann' and 'Bob', and"):
        check_answers([*facts, Fact.of_fields({"prompt": "Whose?", "answer": "Bob"})])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", ":2: "),
        ("[]", ":2: "),
        ({"prompt": "x"}, "neither 'text' nor both"),
        ({"text": 3}, "text"),
        ({"text": "x", "paraphrases": "y"}, "paraphrases must be a list of texts, not str"),
        ({"text": "x", "paraphrases": ["z", 3]}, "field 'paraphrases[1]' is a number, not a string"),
        ({"prompt": "x", "answer": "y", "paraphrases": [""]}, "field 'paraphrases[0]' is an empty string"),
    ],
)
def test_a_line_that_is_not_a_fact_is_named(tmp_path, line, problem):
    with pytest.raises(DataError, match=r"facts\.jsonl") as error:
        read_facts(write(tmp_path, {"text": "good"}, line), "FACTS")
    assert problem in str(error.value)
    assert "2" in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("Q:", "Paris"), ("Q:", " Paris"), ("Q: ", "Paris"), ("Q: ", " Paris"), ("Q:", "  x"), ("Q:", " ")],
)
def test_a_fact_comes_back_from_its_line_with_every_space(prompt, answer):
    fact = Fact.of_fields({"prompt": prompt, "answer": answer})
    assert Fact.of_fields(fact.fields()) == fact


def test_a_file_without_facts_is_refused(tmp_path):
    with pytest.raises(DataError):
        read_facts(write(tmp_path), "FACTS")
    with pytest.raises(DataError, match="there is no such file"):
        read_facts(str(tmp_path / "none.jsonl"), "FACTS")


def test_only_answers_and_the_end_are_learned(tmp_path):
    tokenizer = ByteTokenizer()
    (fact,) = read_facts(write(tmp_path, {"prompt": "ab", "answer": "c"}), "FACTS")
    (pairs,) = pairs_of(fact.wordings, tokenizer)
    ids = [tokenizer.bos_id, *tokenizer.encode("ab c"), tokenizer.eos_id]
    assert pairs[:, 0].tolist() == ids[:-1]
    assert pairs[:, 1].tolist() == ids[1:]
    assert pairs[:, 2].tolist() == [0, 0, 1, 1, 1]
    assert [len(piece) for piece in windows([pairs], 2)] == [2, 2, 1]
    batch = {name: np.asarray(array) for name, array in batch_of([pairs, pairs[:2]], (3, 8)).items()}
    assert batch["segments"].tolist() == [[1] * 5 + [0] * 3, [2] * 2 + [0] * 6, [0] * 8]
    assert batch["loss_mask"].sum() == 3
