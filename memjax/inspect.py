"""`python -m memjax.inspect RUN --prompt "..."`: shows the slots a model reads, and what each adds to the answer."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memjax.config.load import RUN_FOLDER, parse
from memjax.config.section import LocalPath, Positive
from memjax.errors import ConfigError
from memjax.io.command import check_output, exit_code
from memjax.io.ctrl_c import run_command
from memjax.runs.settings import CheckpointSettings, loaded

if TYPE_CHECKING:
    from memjax.runs.load import LoadedModel

PROG = "python -m memjax.inspect"
_SLOT = re.compile(r"L(\d{1,4}):(\d{1,12})", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(CheckpointSettings):
    """What to inspect."""

    prompt: str | None = None
    """A text: prints the slots that its tokens read, and what each adds to the logit of the next token."""
    answer: str | None = None
    """The continuation whose logit is explained; null: the likeliest token."""
    out: LocalPath[str] | None = None
    """A file (.html) for a self-contained page with all tokens and slots."""
    top: Positive[int] = 8
    """Slots to print per layer."""
    token: int | None = None
    """Position of the token whose slots are printed; null: the last of the prompt."""
    slot: str | None = None
    """A slot such as L4:123456: prints the contexts that read it most in a corpus, and the tokens that it promotes."""
    corpus: LocalPath[str] | None = None
    """File, folder or glob of that corpus; null: the training data."""
    corpus_texts: Positive[int] = 20_000
    """Most texts to read from the corpus."""
    batch_size: Positive[int] = 32
    """Texts of the corpus per batch."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if (self.prompt is None) == (self.slot is None):
            yield "prompt and slot: give one of the two"
        if self.slot is not None and not _SLOT.fullmatch(self.slot):
            yield f"slot={self.slot} must name a layer and a row, such as L4:123456"
        if self.out is not None and not self.out.endswith(".html"):
            yield f"out={self.out} must end in .html"
        if self.out is not None and self.prompt is None:
            yield f"out={self.out} is for a prompt; set prompt too"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what a prompt reads, or what reads a slot; returns the exit code."""
    parsed = parse(
        InspectConfig,
        argv,
        prog=PROG,
        description="Shows which table slots a model reads for a prompt and what each adds to the answer, or "
        "which texts read a slot.",
        positional=RUN_FOLDER,
        examples=[
            f'{PROG} runs/quickstart --prompt "What is the major of Tala Greenwood? Answer:" --out page.html',
            f"{PROG} runs/quickstart --slot L1:2442",
        ],
    )
    return exit_code(lambda: _inspect(str(parsed.positional), parsed.config))


def _inspect(run: str, settings: InspectConfig) -> None:
    if settings.out is not None:
        check_output(settings.out, "out")
    with loaded(run, settings) as found:
        if not found.model.config.lookups:
            raise ConfigError(f"{run}: the model has no memory layers and no PEER layers: there are no slots")
        if settings.prompt is not None:
            _show_prompt(found, settings, settings.prompt)
        else:
            _show_slot(found, settings)


def _show_prompt(found: "LoadedModel", settings: InspectConfig, prompt: str) -> None:
    from memjax.io.files import write_atomic
    from memjax.knowledge import page
    from memjax.knowledge.trace import trace

    tokenizer = found.tokenizer
    answer = tokenizer.encode(_after(prompt, settings.answer)) if settings.answer else []
    tokens = tokenizer.prompt(tokenizer.encode(prompt))
    if not tokens:
        raise ConfigError("prompt is empty, and this model's texts begin with no token; write at least one character")
    traced = trace(found.model, tokens, answer)
    number = traced.place if settings.token is None else settings.token
    if not 0 <= number < len(traced.tokens):
        raise ConfigError(f"token={number} must be in 0..{len(traced.tokens) - 1}: there are no more tokens")
    changed = _changed(found, settings)
    values = page.document(traced, tokenizer, found.model.config, changed=changed, title=prompt)
    print("\n".join(lines(values, number, settings.top)))
    if settings.out is not None:
        write_atomic(settings.out, page.render(values))
        print(f"\nwritten to {settings.out}")


def _after(prompt: str, answer: str) -> str:
    """The answer, separated from the prompt by a space."""
    return answer if not prompt or prompt[-1].isspace() or answer[0].isspace() else f" {answer}"


def _changed(found: "LoadedModel", settings: InspectConfig) -> dict[str, set[int]]:
    """The rows that patches have changed, by table."""
    from memjax.runs.patches.applied import Applied
    from memjax.runs.patches.patch import read_patch

    applied = [patch for _, patch in Applied(found.checkpoints).patches(found.step)]
    changed: dict[str, set[int]] = {}
    for patch in [*applied, *map(read_patch, settings.patch)]:
        for name, change in patch.tables.items():
            changed.setdefault(name, set()).update(change.rows.tolist())
    return changed


def lines(values: Mapping[str, Any], number: int, top: int) -> list[str]:
    """A trace for an 80-column terminal: every token with what the layers add, then the `top` slots of each layer for
    one token.
    """
    tokens, layers = values["tokens"], values["layers"]
    few = layers[:3]  # more do not fit next to the tokens
    found = [f"{'':>4}  {'token':<18}{'next':<18}{'p':>7}" + "".join(f"{layer['name']:>9}" for layer in few)]
    for place, token in enumerate(tokens):
        mark = ">" if place == number else " "
        totals = "".join(f"{layer['total'][place]:>+9.2f}" for layer in few)
        found.append(f"{mark}{place:>3}  {_cell(token['text'])}{_cell(token['next'])}{token['p']:>7.1%}{totals}")
    if len(few) < len(layers):
        found.append(f"and {len(layers) - len(few)} more layers, which the page (--out) shows")
    token = tokens[number]
    found += [
        "",
        f"after {_shown(token['text'])}: {_shown(token['next'])}, logit {token['logit']:.2f}, {token['p']:.1%}",
    ]
    others = [f"{_shown(text)} {p:.1%}" for text, p in token["guesses"][:3]]
    found.append(f"likeliest {', '.join(others)}")
    for layer in layers:
        total, rest = layer["total"][number], layer["rest"][number]
        found += ["", f"{layer['name']} adds {total:+.3f} to that logit, {rest:+.3f} of it without any slot"]
        found.append(f"  {'slot':<16}{'weight':>9}{'adds':>10}{'effect':>10}")
        added: list[float] = layer["added"][number]
        picks = sorted(range(len(added)), key=[-abs(value) for value in added].__getitem__)
        for pick in picks[:top]:
            slot = layer["slots"][number][pick]
            mark = "  changed" if slot in layer["changed"] else ""
            name = f"{layer['name']}:{slot}"
            weight, effect = layer["weights"][number][pick], layer["effect"][number][pick]
            found.append(f"  {name:<16}{weight:>9.3f}{added[pick]:>+10.3f}{effect:>+10.3f}{mark}")
        if len(picks) > top:
            remaining = sum(added[pick] for pick in picks[top:])
            found.append(f"  {f'{len(picks) - top} more':<16}{'':>9}{remaining:>+10.3f}")
    return found


def _shown(text: str) -> str:
    return repr(text if len(text) <= 24 else f"{text[:23]}…")


def _cell(text: str) -> str:
    shown = repr(text)[1:-1]
    return f"{shown if len(shown) < 18 else f'{shown[:16]}…':<18}"


def _show_slot(found: "LoadedModel", settings: InspectConfig) -> None:
    from memjax.knowledge.corpus import open_corpus
    from memjax.knowledge.page import text_of
    from memjax.knowledge.reads import layers_of, tables_of
    from memjax.knowledge.slots import slot_report

    layer, _, row = str(settings.slot).partition(":")
    config = found.model.config
    if layer not in (known := layers_of(config)):
        raise ConfigError(f"slot={settings.slot}: layer {layer} has no slots; those that have: {', '.join(known)}")
    num_slots = config.tables[tables_of(config, layer)[-1]].num_slots
    if int(row) >= num_slots:
        raise ConfigError(f"slot={settings.slot} must be below {layer}:{num_slots}: the table has no more rows")
    report = slot_report(
        found.model,
        found.tokenizer,
        open_corpus(found, settings.corpus, "--corpus"),
        layer,
        int(row),
        length=found.config.data.sequence_length,
        batch_size=settings.batch_size,
        contexts=settings.top,
        promoted=settings.top,
        most=settings.corpus_texts,
    )
    print(f"{settings.slot} is read by {report.reads:,} tokens in {report.texts:,} texts")
    if report.contexts:
        print("\nmost by\n  weight  context")
    for context in report.contexts:
        before = found.tokenizer.decode(context.tokens)
        after = found.tokenizer.decode(context.after)
        print(f"  {context.weight:>6.3f}  {_window(before, after)}")
    if report.promoted:
        print("\nthere it adds most to the logits of")
    for token, added in report.promoted:
        print(f"  {added:>+6.3f}  {_shown(text_of(found.tokenizer, token))}")


def _window(before: str, after: str) -> str:
    """A position in a text as one line of 70 columns; a bar follows the token that reads the slot."""
    before, after = (re.sub(r"\s", " ", text) for text in (before, after))
    before = before if len(before) <= 46 else f"…{before[-45:]}"
    room = 68 - len(before)
    return f"{before}|{after if len(after) <= room else after[: room - 1] + '…'}"


if __name__ == "__main__":
    run_command(main)
