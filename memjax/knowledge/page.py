"""Render a trace as a self-contained HTML page."""

import html
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from memjax.config.model import ModelConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.knowledge.reads import tables_of
from memjax.knowledge.trace import Trace


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """A readable form of a token: special tokens by name, undecodable bytes as hex."""
    for name, number in tokenizer.special_tokens.items():
        if number == token:
            return name
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in content)


def document(
    found: Trace, tokenizer: Tokenizer, config: ModelConfig, *, changed: Mapping[str, set[int]], title: str
) -> dict[str, Any]:
    """The trace as JSON values; `changed` holds the slots that patches have changed, by table."""
    name = lambda token: text_of(tokenizer, token)
    tokens = [
        {
            "text": name(token),
            "next": name(target),
            "logit": round(float(logit), 3),
            "p": round(float(p), 4),
            "guesses": [[name(guess), round(share, 4)] for guess, share in guesses],
        }
        for token, target, logit, p, guesses in zip(
            found.tokens, found.targets, found.logits, found.probabilities, found.guesses, strict=True
        )
    ]
    layers = []
    for layer, values in found.layers.items():
        tables = tables_of(config, layer)
        layers.append(
            {
                "name": layer,
                "slots": values.slots.tolist(),
                "weights": _rounded(values.weights),
                "added": _rounded(values.added),
                "effect": _rounded(values.effect),
                "rest": _rounded(values.rest),
                "total": _rounded(values.total),
                "changed": sorted(set().union(*(changed.get(table, set()) for table in tables))),
                "tables": list(tables),
            }
        )
    return {"title": title, "asked": found.place, "tokens": tokens, "layers": layers}


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(np.nan_to_num(values.astype(np.float64)), 4).tolist()


def render(values: Mapping[str, Any]) -> str:
    """Renders a document as an HTML page."""
    # A "</script>" in the data would end the script, and "<!--" change how it is parsed.
    data = json.dumps(values, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"@TITLE@": html.escape(str(values["title"])), "@DATA@": data}
    template = (importlib.resources.files("memjax.knowledge") / "page.html").read_text(encoding="utf-8")
    # In one pass, because inserted text may itself contain a placeholder.
    return re.sub("|".join(parts), lambda found: parts[found[0]], template)
