"""A folder like that of `prepare`, with generated people: shows that everything runs, without data sets."""

import pathlib

from memjax.config.data import BiographiesConfig
from memjax.data.sources import biographies
from realtext.prepare import ARTICLES, BINS, HELD_OUT, QUESTIONS, write


def generate(folder: pathlib.Path, *, num_people: int = 24) -> None:
    """Writes training articles about two thirds of the people, and questions about all of them."""
    config = BiographiesConfig(num_people=num_people)
    told = 2 * num_people // 3
    by_person: dict[str, list[str]] = {}
    for statement in biographies.statements(config):
        by_person.setdefault(statement.person.name, []).append(f"{statement.prompt}{statement.answer}.")
    articles = [{"title": name, "text": "\n".join(lines)} for name, lines in by_person.items()]
    rows = []
    for number, person in enumerate(biographies.people(config)):
        of_set, exposures = ("TriviaQA", "SQuAD")[number % 2], BINS[3 if number < told else 0]
        question = {"set": of_set, "question": f"Where was {person.name} born?", "answers": [person.birth_city]}
        question |= {"target": person.birth_city, "in_text": number < told}
        rows.append(question)
        fact = {"set": "EntityQuestions", "question": f"What did {person.name} study?", "answers": [person.major]}
        rows.append(fact | {"target": person.major, "relation": "major", "paragraphs": 2, "bin": exposures})
        choices = [person.employer, person.university]
        rows.append({"set": "employers", "question": f"Who employs {person.name}?", "choices": choices, "answer": 0})
    rows[-3]["shot"] = True
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / ARTICLES, articles[:told])
    write(folder / HELD_OUT, articles[told:])
    write(folder / QUESTIONS, [*rows, {"set": "HumanEval", "code": "def one():\n    return 1\n"}])
