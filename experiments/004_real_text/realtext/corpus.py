"""Articles and questions as token arrays, built once per machine and read by every process.

A text is one stream in which each article follows a BOS token. Rows are cut from the stream without regard to articles,
so a row may begin inside one, and tokens may attend to the end of the previous article in their row.
"""

import concurrent.futures
import io
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from factlab.lines import read
from numpy.typing import NDArray

from memjax.data.tokenizers.base import ByteTokenizer, Tokenizer
from memjax.data.tokenizers.tiktoken import TiktokenTokenizer
from memjax.errors import DataError
from memjax.io.files import write_atomic
from realtext.prepare import ARTICLES, HELD_OUT, QUESTIONS, SHOTS, TOKENIZER

Row = dict[str, Any]
Ints = NDArray[np.integer]

WIDTH = 160
"""Tokens of a question with its examples and answer."""
SAMPLED_ARTICLES = 100
"""Number of training articles whose bits per byte are also measured."""
CODE = "code"
STREAMS = ("held_out", "seen", CODE)
"""Texts for evaluation: held-out articles, a sample of the training articles, and programs."""


class Text(NamedTuple):
    """A stream of tokens."""

    tokens: Ints
    bytes: int
    """Length of the UTF-8 text."""

    def rows(self, length: int) -> Ints:
        """All tokens as rows of `length` predictions; the last one is padded with BOS tokens."""
        begin = self.tokens[0]
        count = -(-(len(self.tokens) - 1) // length)
        padded = np.append(self.tokens, np.full(count * length + 1 - len(self.tokens), begin, self.tokens.dtype))
        return np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::length]


class Spans(NamedTuple):
    """Rows of tokens, with the span of each that is scored."""

    tokens: Ints
    """[rows, WIDTH + 1]: context, answer, padding."""
    ends: Ints
    """[rows, 2]: start and end of the answer."""


class Corpus(NamedTuple):
    """Tokens and questions of one process."""

    train: Ints
    """The training stream, not yet cut into rows."""
    texts: dict[str, Text]
    """Evaluation texts by name, see STREAMS."""
    tokenizer: Tokenizer
    questions: list[Row]
    """Open questions, in the order of `asked`."""
    asked: Spans
    """Their targets."""
    choices: list[Row]
    """Multiple-choice questions, in the order of `chosen`."""
    chosen: Spans
    """All choices of each question in turn."""


def tokenizer_of(folder: pathlib.Path) -> Tokenizer:
    """GPT-2's tokenizer if the folder has it, else bytes."""
    path = folder / TOKENIZER
    if not path.exists():
        return ByteTokenizer()
    return TiktokenTokenizer.of_file(path.read_bytes(), pattern="gpt2", special_tokens=["<|endoftext|>"])


def build(folder: pathlib.Path, work: pathlib.Path) -> None:
    """Tokenises a prepared folder, unless that has been done.

    Raises:
        DataError: the folder lacks a file.
    """
    done = work / "streams.json"
    if done.exists():
        return
    if missing := [name for name in (ARTICLES, HELD_OUT, QUESTIONS) if not (folder / name).exists()]:
        raise DataError(f"{folder}: lacks {', '.join(missing)}; make it with `run.py --prepare DATA {folder}`")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(folder)
    articles = [_as_text(row) for row in read(folder / ARTICLES)]
    programs = [row["code"] for row in read(folder / QUESTIONS) if "code" in row]
    texts = {
        "train": articles,
        "held_out": [_as_text(row) for row in read(folder / HELD_OUT)],
        "seen": articles[:: max(1, len(articles) // SAMPLED_ARTICLES)],
        CODE: programs,
    }
    sizes = {}
    for name, some in texts.items():
        tokens = _stream(tokenizer, some)
        np.save(content := io.BytesIO(), tokens)
        write_atomic(work / f"{name}.npy", content.getvalue())
        sizes[name] = sum(len(text.encode()) for text in some)
        print(f"{name}: {len(some):,} texts, {sizes[name] / 1e6:.1f} MB, {len(tokens) / 1e6:.2f} M tokens", flush=True)
    write_atomic(done, json.dumps(sizes))


def _as_text(article: Row) -> str:
    return f"{article['title']}\n\n{article['text']}"


def _stream(tokenizer: Tokenizer, texts: Sequence[str]) -> Ints:
    """Concatenates texts, each after a BOS token; uses threads, because the tokenizer releases the GIL."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    encoded = lambda text: np.array([tokenizer.bos_id, *tokenizer.encode(text)], dtype)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(encoded, texts)))


def load(folder: pathlib.Path, work: pathlib.Path) -> Corpus:
    """Loads the streams that `build` wrote, and the folder's questions as rows of tokens."""
    sizes = json.loads((work / "streams.json").read_text())
    stream = lambda name: np.load(work / f"{name}.npy", mmap_mode="r")
    tokenizer = tokenizer_of(folder)
    rows = list(read(folder / QUESTIONS))
    shots: dict[str, list[str]] = {}
    for row in rows:
        if row.get("shot"):
            shots.setdefault(row["set"], []).append(f"{_ask(row)} {row['target']}\n\n")
    questions = [row for row in rows if "target" in row and not row.get("shot")]
    choices = [row for row in rows if "choices" in row]
    asked = [(shots.get(row["set"], [])[:SHOTS], _ask(row), f" {row['target']}") for row in questions]
    chosen = [([], _ask(row), f" {choice}") for row in choices for choice in row["choices"]]
    return Corpus(
        stream("train"),
        {name: Text(stream(name), sizes[name]) for name in STREAMS},
        tokenizer,
        questions,
        spans(tokenizer, asked),
        choices,
        spans(tokenizer, chosen),
    )


def _ask(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def spans(tokenizer: Tokenizer, rows: Iterable[tuple[Sequence[str], str, str]], width: int = WIDTH) -> Spans:
    """Tokenises rows of examples, prompt and answer. If a row is too long, the first examples are dropped, then the
    prompt is truncated from the left; answers longer than half the width are truncated at the end.
    """
    tokens, ends = [], []
    for examples, prompt, answer in rows:
        answer_ids = tokenizer.encode(answer)[: width // 2]
        parts = [tokenizer.encode(text) for text in (*examples, prompt)]
        room = width - len(answer_ids)
        while len(parts) > 1 and sum(map(len, parts)) > room:
            parts.pop(0)
        before = [token for part in parts for token in part][-room:]
        row = [tokenizer.bos_id, *before, *answer_ids]
        tokens.append(row + [tokenizer.bos_id] * (width + 1 - len(row)))
        ends.append((1 + len(before), len(row)))
    return Spans(np.array(tokens, np.int32).reshape(-1, width + 1), np.array(ends, np.int32).reshape(-1, 2))
