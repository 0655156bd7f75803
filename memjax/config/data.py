"""Settings of the data: sources, their mixture, the tokenizer, and how records become batches."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from memjax.config.section import BelowOne, LocalPath, NotNegative, PathOrAddress, Positive, Section, Share


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig(Section):
    """How text becomes token ids."""

    kind: Literal["byte", "bpe", "hf", "sentencepiece", "tiktoken"] = "bpe"
    """byte: the 256 bytes and the special tokens; bpe: byte-level BPE trained on the run's own corpus; the others are
    read from a file: hf a tokenizer.json with a byte-level BPE, sentencepiece a .model, tiktoken a file of ranks."""
    path: LocalPath[str] | None = None
    """The file (hf, sentencepiece and tiktoken); the run keeps a copy."""
    train_bytes: Positive[int] = 10_000_000
    """Text of the corpus, in bytes, that a BPE is trained on (spread evenly over it)."""
    bos: str | None = None
    """The file's special token that begins a text; null: the one of a known name, or the one that ends texts."""
    eos: str | None = None
    """The file's special token that ends a text; null: the one of a known name."""
    pattern: Literal["gpt2", "cl100k", "o200k"] = "gpt2"
    """How text is cut before ranks are applied, which their file does not say; Llama 3 has cl100k's (tiktoken)."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Special tokens, which get the ids after the last rank in this order (tiktoken)."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens that were added to the file's own, with the ids after its last piece (sentencepiece)."""
    end_tokens: tuple[str, ...] = ()
    """Special tokens besides eos at which generation ends."""
    adds_bos: bool = True
    """Whether prompts begin with the begin token, in generation and evaluation; records of a training always do."""

    def problems(self) -> Iterator[str | None]:
        """Settings that are for another kind."""
        for name, value in (("path", self.path), ("bos", self.bos), ("eos", self.eos)):
            if value is not None and self.kind in ("byte", "bpe"):
                yield f"{name}={value} is for a tokenizer from a file; set kind to hf, sentencepiece or tiktoken"
        if self.added_tokens and self.kind != "sentencepiece":
            yield f"added_tokens={list(self.added_tokens)} is for kind sentencepiece, whose files lack added tokens"
        if len(set(self.special_tokens)) < len(self.special_tokens) or "" in self.special_tokens:
            yield f"special_tokens={list(self.special_tokens)} must name each token once, and none may be empty"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BiographiesConfig(Section):
    """Generated people with six facts each, told in several wordings and asked about in questions."""

    num_people: Positive[int] = 500
    """People, each with a full name of their own."""
    form: Literal["fact", "biography"] = "fact"
    """fact: one sentence a record; biography: all six sentences of a person in an order redrawn every time."""
    held_out_fraction: Share[float] = 0.5
    """Share of the people whose questions are never asked in training (their facts are told)."""
    seed: int = 0
    """Draws the people and their facts."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig(Section):
    """One part of a mixture."""

    name: str
    """Name used in metrics and as the folder of its prepared data."""
    path: PathOrAddress[str]
    """File, folder or glob, as in data.path."""
    source: Literal["files", "jsonl", "text"] = "files"
    """How its files are read, as in data.source."""
    weight: Positive[float] = 1.0
    """Share of the tokens of the training, relative to the weights of the other parts."""

    def problems(self) -> Iterator[str | None]:
        """An invalid name."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            yield f"name={self.name} must consist of letters, digits, - and _: a folder and metrics are named after it"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
    """What the model reads, and how records become batches."""

    source: Literal["biographies", "jsonl", "text", "files", "huggingface", "mixture"] = "biographies"
    """biographies: generated; jsonl: a JSON object a line; text: a document a line; files: as the suffix says (.jsonl
    .txt .parquet .arrow .array_record, lines also with .gz .xz .zst .bz2); huggingface: the dataset that path names, by
    way of the package datasets; mixture: the parts in `mixture`."""
    path: PathOrAddress[str] | None = None
    """The training data (jsonl, text, files): a file, a folder or a glob, read in sorted order. An address (gs://, s3://,
    hf://, http) is read by way of a copy in the user's cache folder."""
    subset: str | None = None
    """The subset of the dataset (source: huggingface); null: its default."""
    split: str = "train"
    """The split of the dataset that is trained on (source: huggingface)."""
    mixture: tuple[MixtureConfig, ...] = ()
    """Parts that are mixed (source: mixture), as {name, path, weight, source} each."""
    validation_path: PathOrAddress[str] | None = None
    """The validation data; null holds the last validation_fraction of the records (of every part) out of training."""
    validation_fraction: BelowOne[float] = 0.005
    """Share of the records held out when validation_path is null."""
    prepared: LocalPath[str] | None = None
    """Folder of the tokenised data; null: `prepared` in the run's folder. Compressed files, Parquet, ArrayRecord,
    mixtures and whatever is read with malformed: skip are tokenised there before the training; see memjax.prepare."""
    malformed: Literal["strict", "skip"] = "strict"
    """strict: a record that cannot be used ends the run; skip: it is left out, counted and reported."""
    max_malformed: NotNegative[int] = 1000
    """The most records that may be left out of a part (malformed: skip); more end the run."""
    damaged_files: Literal["strict", "skip"] = "strict"
    """strict: a file of which a part cannot be read ends the run; skip: the rest of it is used (malformed: skip)."""
    max_record_bytes: Positive[int] = 64_000_000
    """The largest record; a larger one is malformed, and is never read into memory."""
    text_key: str = "text"
    """Field (JSON, Parquet) with a whole document; all its tokens are learned."""
    prompt_key: str = "prompt"
    """Field with a prompt, used in records without text_key; its tokens are read, not learned."""
    answer_key: str = "answer"
    """Field with the answer to the prompt; only its tokens are learned."""
    sequence_length: Positive[int] = 64
    """Tokens the model sees at once."""
    batch_size: Positive[int] = 32
    """Sequences per optimizer step, over all devices and micro-batches."""
    packing: Literal["none", "concat", "first_fit"] = "first_fit"
    """none: one record a sequence, cut and padded; concat: records end to end, unpadded; first_fit: whole records."""
    document_mask: bool = True
    """Attention and positions stay inside a record when several share a sequence."""
    shuffle: bool = True
    """Shuffle all records anew in every epoch."""
    num_workers: NotNegative[int] = 0
    """Processes that read and tokenise; 0 uses threads of this process."""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    """How text becomes token ids."""
    biographies: BiographiesConfig = dataclasses.field(default_factory=BiographiesConfig)
    """The generated people (source: biographies)."""

    def problems(self) -> Iterator[str | None]:
        """Invalid names, and settings that are for another source."""
        if self.source == "mixture" and not self.mixture:
            yield f"source={self.source} needs the parts to mix; list them in mixture, as {{name, path, weight}} each"
        if self.source != "mixture" and self.mixture:
            yield f"source={self.source} does not read mixture; set source to mixture, or remove the list"
        if self.source == "mixture" and self.path is not None:
            yield f"path={self.path} is not read with source=mixture; make it a part of mixture"
        names = [part.name for part in self.mixture]
        if len(set(names)) < len(names):
            yield f"mixture={names} must give every part a name of its own"
        if not re.fullmatch(r"\w[\w.-]*", self.split):
            yield f"split={self.split} must be the name of a split, such as train; validation_fraction holds a part out"

    @property
    def rows_hold_documents(self) -> bool:
        """Whether attention has to keep documents apart: not where each has a row of its own, or rows are one text."""
        return self.document_mask and self.packing != "none"

    def in_run(self, folder: str) -> "DataConfig":
        """The same data, with the folder of the prepared data named also where it is the run's own."""
        return self if self.prepared else dataclasses.replace(self, prepared=f"{folder}/prepared")
