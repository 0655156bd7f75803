"""Fact knowledge of a model in bits, in total and per parameter (arXiv:2404.05405).

The information in the facts about the generated people is known exactly, since each value is drawn from a known number
of choices. A model that needs p nats for the values given the person's name, where a model that knows nothing about the
person needs log S0, has learned at least log S0 - p nats. The paper also counts the names; here names occur only in
prompts, which are not learned, so they are given. The work city follows from the employer and is not counted.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from memjax.config.data import DataConfig
from memjax.data.sources import biographies
from memjax.data.sources.biographies import Person
from memjax.data.tokenizers.base import Tokenizer
from memjax.evaluation.recall import answer_requests
from memjax.inference.scoring import score
from memjax.models.counts import count_parameters
from memjax.models.decoder import Decoder
from memjax.models.parts import split_decoder

CHOICES = {
    "birth_date": len(biographies.DAYS) * len(biographies.MONTHS) * len(biographies.YEARS),
    "birth_city": len(biographies.CITIES),
    "university": len(biographies.UNIVERSITIES),
    "major": len(biographies.MAJORS),
    "employer": len(biographies.EMPLOYERS),
}
"""Number of values of each attribute, all equally likely and none a prefix of another."""

_RENDERINGS = 2
"""Wordings in which each fact is scored; their losses are averaged."""


class _Statement(NamedTuple):
    """A fact in a wording of the training data."""

    attribute: str
    prompt: str
    value: str


def knowledge_report(
    model: Decoder,
    tokenizer: Tokenizer,
    config: DataConfig,
    limit_people: int | None = None,
    *,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Fact knowledge of a model trained on biographies, as JSON values.

    `bits` is a lower bound for all people of the config together, `bits_to_know` its maximum, and `by_attribute` holds
    both per person. Negative bits mean that the model is worse than a uniform guess. `bits_per_parameter` counts all
    parameters except embedding rows for which the tokenizer has no token, `bits_per_table_parameter` (None without
    memory layers) only the tables.

    With limit_people, that many people are measured and their mean stands for all. Under a mesh, batch_size must be a
    multiple of its devices.
    """
    people = biographies.people(config.biographies)
    measured = people[:limit_people]
    # In a biography the full stop belongs to the value, and any sentence may come first.
    statements = _statements(measured, config.biographies.seed, "." if config.biographies.form == "biography" else "")
    nats: dict[str, list[float]] = defaultdict(list)
    for statement, loss in zip(statements, _losses(model, tokenizer, statements, batch_size), strict=True):
        nats[statement.attribute].append(loss)
    by_attribute = {}
    for name, choices in CHOICES.items():
        needed = float(np.mean(nats[name])) / math.log(2)
        by_attribute[name] = {"bits": math.log2(choices) - needed, "bits_to_know": math.log2(choices)}
    bits, to_know = (len(people) * sum(item[key] for item in by_attribute.values()) for key in ("bits", "bits_to_know"))
    counts, shape = count_parameters(split_decoder(model)[0]), model.config
    no_token = max(0, shape.vocab_size - tokenizer.vocab_size) * shape.dim * (1 if shape.tie_embeddings else 2)
    parameters = counts.total - no_token
    return {
        "people": len(people),
        "people_measured": len(measured),
        "bits": bits,
        "bits_to_know": to_know,
        "by_attribute": by_attribute,
        "parameters": parameters,
        "bits_per_parameter": bits / parameters,
        "table_parameters": counts.table,
        "bits_per_table_parameter": bits / counts.table if counts.table else None,
    }


def format_knowledge_report(report: Mapping[str, Any]) -> str:
    """The report as text for the terminal."""
    people, bits, to_know = report["people"], report["bits"], report["bits_to_know"]
    measured = "" if report["people_measured"] == people else f", measured on {report['people_measured']:,}"
    share = f" ({bits / to_know:.1%})" if bits >= 0 else ", worse than a uniform guess"
    all_facts = f"all facts: {to_know / report['parameters']:.4g}"
    most = f"{report['parameters']:,} parameters, without those of unused ids; {all_facts}"
    rows = [
        ("bits known", f"{bits:,.0f} of {to_know:,.0f}{share}; {people:,} people{measured}"),
        ("  per parameter", f"{report['bits_per_parameter']:.4g} ({most})"),
    ]
    if report["bits_per_table_parameter"] is not None:
        value = f"{report['bits_per_table_parameter']:.4g} ({report['table_parameters']:,} in the tables)"
        rows.append(("  per table parameter", value))
    for name, item in report["by_attribute"].items():
        value = f"{item['bits']:.2f} of {item['bits_to_know']:.2f} for each person"
        rows.append((f"  {name.replace('_', ' ')}", value))
    rows.append(("  work city", "0: it follows from the employer"))
    lines = ["Bits of facts that the model stores (a lower bound)", ""]
    return "\n".join([*lines, *(f"{label:<26}{text}" for label, text in rows)])


def _statements(people: Sequence[Person], seed: int, end: str) -> list[_Statement]:
    """Every counted fact, each in randomly drawn wordings."""
    rng, found = np.random.default_rng([seed, 3]), []
    for person in people:
        for attribute in CHOICES:
            wordings = biographies.STATEMENTS[attribute]
            for number in rng.permutation(len(wordings))[:_RENDERINGS]:
                prompt = wordings[number].format(name=person.name)
                found.append(_Statement(attribute, prompt, f" {person.value(attribute)}{end}"))
    return found


def _losses(model: Decoder, tokenizer: Tokenizer, statements: Sequence[_Statement], batch_size: int) -> list[float]:
    """-log p of each value after its prompt, in nats."""
    requests = answer_requests(tokenizer, [(one.prompt, one.value) for one in statements], end=False)
    return [-one.log_likelihood for one in score(model, requests, batch_size=batch_size)]
