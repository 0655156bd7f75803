"""The YAML of configs: YAML 1.2 by ruamel.yaml (3e-4 is a number, `no` is text), without tags, anchors and aliases."""

import decimal
import io
import math
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter


class _Composer(Composer):
    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Composes the next node; rejects tags, anchors and aliases."""
        event = self.parser.peek_event()
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            what = "tags (!) and anchors (&, *) are not allowed; quote the text, or use `extends:`"
            raise ComposerError(None, None, what, event.start_mark)
        return super().compose_node(parent, index)


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: Any) -> bool:
        """Disables aliases, so that every value is written out."""
        return True


_Representer.add_representer(
    tuple, lambda self, items: self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)
# The emitter breaks lines at U+0085, U+2028 and U+2029 unless the text is in double quotes.
_Representer.add_representer(
    str,
    lambda self, text: self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'),
)


def compose(text: str) -> Node | None:
    """The document as nodes with their places; None if it is empty.

    Raises:
        YAMLError: it is not YAML 1.2, or uses tags, anchors or aliases.
    """
    if re.search(r"^%YAML[ \t]+1\.[01]\b", text, re.MULTILINE):  # in which 012 is ten and `no` is false
        raise ComposerError(None, None, "this is read as YAML 1.2; remove the %YAML line", None)
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    return yaml.compose(text)


def dump(tree: dict[str, Any]) -> str:
    """The YAML of a tree, which `compose` reads back unchanged."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style, yaml.allow_unicode, yaml.width = False, True, 10_000
    yaml.representer.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


_READER = YAML(typ="safe", pure=True).constructor
_CONSTRUCTORS = {
    "tag:yaml.org,2002:null": _READER.construct_yaml_null,
    "tag:yaml.org,2002:bool": _READER.construct_yaml_bool,
    "tag:yaml.org,2002:int": _READER.construct_yaml_int,
    "tag:yaml.org,2002:float": _READER.construct_yaml_float,
}


def scalar(node: ScalarNode) -> Any:
    """The value of a scalar: null, true, false or a finite number; anything else, including dates, is text."""
    try:
        value = _CONSTRUCTORS[node.tag](node)
    except (KeyError, ValueError):  # ValueError: underscores without digits, more digits than Python reads
        return node.value
    is_small = isinstance(value, float) and abs(value) < 1e40
    if is_small and value.is_integer() and re.fullmatch(r"[+-]?[0-9]+[eE][+]?[0-9]+", node.value):
        value = int(decimal.Decimal(node.value))  # so that integer fields accept 1e6; float fields accept integers too
    # Numbers that overflow stay text, so that validation rejects them by name.
    fits = math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and abs(value) < 10**40
    return value if value is None or fits else node.value


def why_invalid(error: MarkedYAMLError) -> str:
    """Explains a YAML error, with its likely cause."""
    problem = error.problem or "it cannot be read"
    if problem.startswith("but "):
        problem = f"{error.context}, {problem}"
    if "'\\t'" in problem:
        return f"{problem}; indent with spaces, not with tabs"
    if problem.startswith("mapping values are not allowed"):
        return f"{problem}; look at how far this line is indented, and put text with a colon in quotes"
    return problem
