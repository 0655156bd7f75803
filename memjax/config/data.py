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
    """byte: the 256 bytes and the special tokens; bpe: byte-level BPE trained on the run's own corpus. The others are
    read from a file. hf: a tokenizer.json with a byte-level BPE; sentencepiece: a .model; tiktoken: a rank file."""
    path: LocalPath[str] | None = None
    """The file (hf, sentencepiece and tiktoken); the run keeps a copy."""
    train_bytes: Positive[int] = 10_000_000
    """Bytes of text that a BPE is trained on, sampled evenly from the corpus."""
    bos: str | None = None
    """The file's special token that begins a text; null: the one with a known name, or else eos."""
    eos: str | None = None
    """The file's special token that ends a text; null: the one with a known name."""
    pattern: Literal["gpt2", "cl100k", "o200k"] = "gpt2"
    """How text is split before merging, which rank files do not say; Llama 3 uses cl100k (tiktoken)."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Special tokens, with the ids after the last rank, in this order (tiktoken)."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens added to the file's own, with the ids after its last piece (sentencepiece)."""
    end_tokens: tuple[str, ...] = ()
    """Special tokens other than eos that end generation."""
    adds_bos: bool = True
    """Begin prompts with bos in generation and evaluation; training records always begin with it."""

    def problems(self) -> Iterator[str]:
        for name, value in (("path", self.path), ("bos", self.bos), ("eos", self.eos)):
            if value is not None and self.kind in ("byte", "bpe"):
                yield f"{name}={value} is for a tokenizer from a file; set kind to hf, sentencepiece or tiktoken"
        if self.added_tokens and self.kind != "sentencepiece":
            yield f"added_tokens={list(self.added_tokens)} is for kind sentencepiece, whose files lack added tokens"
        if len(set(self.special_tokens)) < len(self.special_tokens) or "" in self.special_tokens:
            yield f"special_tokens={list(self.special_tokens)} must name each token once, and none may be empty"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BiographiesConfig(Section):
    """Generated people with six facts each, stated in several wordings and asked about in questions."""

    num_people: Positive[int] = 500
    """People, each with a unique full name."""
    form: Literal["fact", "biography"] = "fact"
    """fact: one sentence per record; biography: all six sentences of a person, in a new random order each time."""
    held_out_fraction: Share[float] = 0.5
    """Fraction of people whose questions are not in the training data (their facts are)."""
    seed: int = 0
    """Seed of the people and their facts."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig(Section):
    """One component of a mixture."""

    name: str
    """Its name in metrics, and the name of the folder with its prepared data."""
    path: PathOrAddress[str]
    """File, folder or glob, as in data.path."""
    source: Literal["files", "jsonl", "text"] = "files"
    """How its files are read, as in data.source."""
    weight: Positive[float] = 1.0
    """Share of training tokens, relative to the other weights."""

    def problems(self) -> Iterator[str]:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            yield f"name={self.name} must consist of letters, digits, - and _: a folder and metrics are named after it"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
    """The training and validation data, and how records become batches."""

    source: Literal["biographies", "jsonl", "text", "files", "huggingface", "mixture"] = "biographies"
    """biographies: generated; jsonl: a JSON object per line; text: a document per line; files: by suffix (.jsonl .txt
    .parquet .arrow .array_record, lines also with .gz .xz .zst .bz2); huggingface: the dataset named by path, through
    the package datasets; mixture: the components in `mixture`."""
    path: PathOrAddress[str] | None = None
    """The training data (jsonl, text, files): a file, folder or glob, read in sorted order. A URL (gs://, s3://, hf://,
    http) is first copied to the user's cache folder."""
    subset: str | None = None
    """The subset of the dataset (source: huggingface); null: its default."""
    split: str = "train"
    """The split of the dataset to train on (source: huggingface)."""
    mixture: tuple[MixtureConfig, ...] = ()
    """The components (source: mixture), each as {name, path, weight, source}."""
    validation_path: PathOrAddress[str] | None = None
    """The validation data; null: the last validation_fraction of the records (of each component)."""
    validation_fraction: BelowOne[float] = 0.005
    """Fraction of records held out for validation when validation_path is null."""
    prepared: LocalPath[str] | None = None
    """Folder of the tokenised data; null: `prepared` in the run's folder. Compressed files, Parquet, ArrayRecord,
    mixtures and any data read with malformed: skip are tokenised there before training; see memjax.prepare."""
    malformed: Literal["strict", "skip"] = "strict"
    """strict: an unusable record ends the run; skip: it is skipped, counted and reported."""
    max_malformed: NotNegative[int] = 1000
    """Maximum number of records to skip per component (malformed: skip); more end the run."""
    damaged_files: Literal["strict", "skip"] = "strict"
    """strict: a partly unreadable file ends the run; skip: the rest of it is used (needs malformed: skip)."""
    max_record_bytes: Positive[int] = 64_000_000
    """Size of the largest valid record; larger ones are malformed, and never read into memory."""
    text_key: str = "text"
    """Field (JSON, Parquet) with a whole document; the loss covers all its tokens."""
    prompt_key: str = "prompt"
    """Field with a prompt, in records without text_key; its tokens do not count in the loss."""
    answer_key: str = "answer"
    """Field with the answer to the prompt; the loss covers only its tokens."""
    sequence_length: Positive[int] = 64
    """Tokens per sequence."""
    batch_size: Positive[int] = 32
    """Sequences per optimizer step, summed over devices and micro-batches."""
    packing: Literal["none", "concat", "first_fit"] = "first_fit"
    """none: one record per sequence, truncated and padded; concat: records end to end, unpadded; first_fit: whole
    records, as many as fit."""
    document_mask: bool = True
    """Confine attention and positions to each record when several share a sequence."""
    shuffle: bool = True
    """Reshuffle all records every epoch."""
    num_workers: NotNegative[int] = 0
    """Processes that read and tokenise; 0: a thread of this process. More processes help if progress lines say
    "waiting for data"."""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    """How text becomes token ids."""
    biographies: BiographiesConfig = dataclasses.field(default_factory=BiographiesConfig)
    """Generated people (source: biographies)."""

    def problems(self) -> Iterator[str]:
        if self.source == "mixture" and not self.mixture:
            yield f"source={self.source} needs the parts to mix; list them in mixture, as {{name, path, weight}} each"
        if self.source != "mixture" and self.mixture:
            yield f"source={self.source} does not read mixture; set source to mixture, or remove the list"
        if self.source == "mixture" and self.path is not None:
            yield f"path={self.path} is not read with source=mixture; make it a component of the mixture"
        names = [part.name for part in self.mixture]
        if len(set(names)) < len(names):
            yield f"mixture={names} must give every component its own name"
        if not re.fullmatch(r"\w[\w.-]*", self.split):
            yield f"split={self.split} must be the name of a split, such as train; validation_fraction holds a part out"

    @property
    def rows_hold_documents(self) -> bool:
        """Whether attention must be confined to documents: a row may hold several, and is not treated as one text."""
        return self.document_mask and self.packing != "none"

    def in_run(self, folder: str) -> "DataConfig":
        """The config with `prepared` set, by default to a folder within the run's."""
        return self if self.prepared else dataclasses.replace(self, prepared=f"{folder}/prepared")
