"""The YAML of configs: the scalars of YAML 1.2, and nothing that could surprise."""

import math
import re
from typing import Any

import yaml
from yaml.composer import ComposerError


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars (3e-4 is a number, `no` is text), without tags, anchors and aliases."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; a tag, an anchor or an alias is refused."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            what = "tags (!) and anchors (&, *) are not allowed; quote the text, or use `extends:`"
            raise ComposerError(None, None, what, event.start_mark)
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


_DIGITS = "0123456789"
for _kind, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9](?:_?[0-9])*)", list("-+" + _DIGITS)),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        list("-+." + _DIGITS),
    ),
):
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _starts)
Dumper.add_representer(
    tuple, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def scalar(node: yaml.ScalarNode) -> Any:
    """The value of a word."""
    kind, text = node.tag.rpartition(":")[2], node.value.replace("_", "")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    # What overflows stays text, so that the validation refuses it with its name.
    if kind == "int" and len(text) < 40:
        return int(text)
    if kind == "float" and math.isfinite(float(text)):
        return float(text)
    return node.value


def why_invalid(error: yaml.MarkedYAMLError) -> str:
    """What is wrong with a text that is no YAML, and what it mostly comes from."""
    problem = error.problem or "it cannot be read"
    if problem.startswith("but "):
        problem = f"{error.context}, {problem}"
    if "'\\t'" in problem:
        return f"{problem}; indent with spaces, not with tabs"
    if problem.startswith("mapping values are not allowed"):
        return f"{problem}; look at how far this line is indented, and put text with a colon in quotes"
    return problem
