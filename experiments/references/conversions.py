"""Compares models, greedy texts and tokenizers with torch and transformers."""

import base64
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
import tiktoken
import tokenizers
import torch
import transformers
from checks import Check, relative
from tiktoken.load import load_tiktoken_bpe
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import memjax
from memjax.config.data import DataConfig, TokenizerConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer, Tokenizer
from memjax.data.tokenizers.bpe import train_bpe
from memjax.data.tokenizers.open import open_tokenizer
from memjax.inference.text import continue_texts
from memjax.interop.huggingface.convert import from_hf, to_hf
from memjax.models.parts import DecoderParts
from memjax.runs.write import write_run

TOKENS = 512
SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, grouped queries": ("llama", HEADS),
    "Llama, wide heads, biases": ("llama", {**HEADS, "head_dim": 24, "attention_bias": True}),
    "Llama, tied embeddings": ("llama", {**HEADS, "tie_word_embeddings": True}),
    "Mistral, window 64": ("mistral", {**HEADS, "sliding_window": 64}),
    "Mistral, width not divisible by its heads": (
        "mistral",
        {"hidden_size": 50, "head_dim": 12, **HEADS, "sliding_window": None},
    ),
    "Qwen 2": ("qwen2", HEADS),
    "Qwen 2, window 64": (
        "qwen2",
        {**HEADS, "use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 3},
    ),
    "Qwen 3": ("qwen3", {**HEADS, "head_dim": 24}),
    "OLMo 2": ("olmo2", {**HEADS, "rope_theta": 500000.0, "pad_token_id": None, "eos_token_id": 2}),
    "OLMo 2, biases, tied embeddings": (
        "olmo2",
        {**HEADS, "attention_bias": True, "tie_word_embeddings": True, "pad_token_id": None, "eos_token_id": 2},
    ),
    "SmolLM 3": ("smollm3", {**HEADS, "no_rope_layers": [1, 0, 1], "pad_token_id": None}),
}
SCALINGS: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 8.0, **LLAMA3},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "yarn, mscale": {"factor": 4.0, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False},
    "longrope": {"factor": 4.0, "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0] * 8},
}
PROMPTS = [
    "The capital of France is",
    "Hello, world",
    "  two spaces",
    "def f(x):\n\treturn x",
    "naïve café",
    "1 + 1 =",
    "日本",
    "A",
    "the cat sat on the mat and the dog",
    "\n\nnew line",
    "MiXeD CaSe",
    "a, b; c. d!",
    "tab\there",
    "🙂",
    "x" * 40,
]


def models_in_and_out(folder: pathlib.Path) -> Iterator[Check]:
    """Random transformers models: imported, compared, exported, and loaded by transformers again."""
    transformers.utils.logging.disable_progress_bar()
    for number, (name, (kind, fields)) in enumerate(MODELS.items()):
        yield from _there_and_back(folder / f"{number}-{kind}", name, kind, fields)
    for name, scaling in SCALINGS.items():
        rope = {"rope_type": name.split(",")[0], "rope_theta": 10000.0, **scaling}
        if rope["rope_type"] in ("llama3", "yarn", "longrope"):
            rope["original_max_position_embeddings"] = 128
        longest = 128 if rope["rope_type"] == "dynamic" else TOKENS
        fields = {**HEADS, "rope_parameters": rope, "max_position_embeddings": longest}
        yield from _there_and_back(folder / name, f"Llama, {name} scaling", "llama", fields, beyond=128)


def _there_and_back(
    folder: pathlib.Path, name: str, kind: str, fields: dict[str, Any], beyond: int | None = None
) -> Iterator[Check]:
    torch.manual_seed(0)
    longest = {"max_position_embeddings": 2048}
    config = AutoConfig.for_model(kind, **{**SIZES, **longest, "num_attention_heads": 4, **fields})
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in reference.parameters():  # larger than at initialisation, including norms and biases
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + noise / 8 if parameter.ndim == 1 else parameter * 6)
    reference.save_pretrained(folder / "model")
    from_hf(folder / "model", folder / "run", tokenizer="byte")
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (1, TOKENS))
    model = memjax.load(folder / "run").model
    lengths = [TOKENS] if beyond is None else [beyond, TOKENS]
    for length in lengths:
        expected = _logits(folder / "model", tokens[:, :length], torch.float32)
        found = np.asarray(model(jnp.asarray(tokens[:, :length], jnp.int32)))
        figure, bound = relative(found, expected), 1e-5
        what = f"logits of {length} tokens"
        if beyond is not None and length > beyond:
            # There, the reference's own rounding of angles matters.
            exact = _logits(folder / "model", tokens[:, :length], torch.float64)
            bound = max(bound, 2 * relative(expected, exact))
            figure, what = relative(found, exact), f"{what}, beyond the original {beyond}, to float64"
        yield Check("models in", name, "transformers", what, figure, bound)
    to_hf(folder / "run", folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again").state_dict()
    before = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    differ = sum(not torch.equal(before[key], again[key]) for key in before) + len(before.keys() ^ again.keys())
    yield Check("models out", name, "transformers", "tensors with other bits", float(differ), 0.0)
    first = _logits(folder / "model", tokens, torch.float32)
    yield Check(
        "models out", name, "transformers", "logits of the exported folder, to the original's",
        relative(_logits(folder / "again", tokens, torch.float32), first), 1e-6,
    )  # fmt: skip


def _logits(folder: pathlib.Path, tokens: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.double().numpy()


def greedy_texts(folder: pathlib.Path) -> Iterator[Check]:
    """15 prompts for each kind of tokenizer: memjax's texts against those of the exported model in transformers."""
    equal = total = 0
    for kind, tokenizer in tokenizers_of(folder).items():
        if kind == "tiktoken":
            continue
        vocab_size = -(-tokenizer.vocab_size // 8) * 8
        model = ModelConfig(
            dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=96, vocab_size=vocab_size, memory=None
        )
        parts = DecoderParts.of(model)
        params, tables = parts.init(jax.random.key(1))
        params = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, params)
        decoder = parts.merge(params, tables)
        run = RunConfig(model=model, data=DataConfig(sequence_length=128))
        write_run(folder / f"{kind}-run", decoder, tokenizer, run)
        to_hf(folder / f"{kind}-run", folder / f"{kind}-hf")
        there = AutoTokenizer.from_pretrained(folder / f"{kind}-hf")
        reference = AutoModelForCausalLM.from_pretrained(folder / f"{kind}-hf")
        ours = [text.text for text in continue_texts(decoder, tokenizer, PROMPTS, max_tokens=24)]
        for prompt, text in zip(PROMPTS, ours, strict=True):
            inputs = there(prompt, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            written = reference.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
            equal += tokenizer.decode(written.tolist()) == text
            total += 1
    yield Check(
        "generation", "4 kinds of tokenizers, 15 prompts", "transformers with its defaults",
        f"greedy texts that differ of {total}", float(total - equal), 0.0,
    )  # fmt: skip


def token_ids(folder: pathlib.Path) -> Iterator[Check]:
    """Ids of 2,000 unusual strings, against the libraries that wrote the files, and transformers after export."""
    texts = odd_texts(2000)
    for kind, tokenizer in tokenizers_of(folder).items():
        own = tokenizer.encode_batch(texts)
        lost = sum(tokenizer.decode(ids) != text for ids, text in zip(own, texts, strict=True))
        if kind != "tiktoken":
            out = folder / f"{kind}-export"
            _export(out, tokenizer)
            there = AutoTokenizer.from_pretrained(out)
            # memjax encodes a text that spells a special token as text.
            plain = [(ids, text) for ids, text in zip(own, texts, strict=True) if "<" not in text]
            differ = sum(there(text)["input_ids"] != tokenizer.prompt(ids) for ids, text in plain)
            yield Check(
                "tokenizers", f"kind {kind}", "transformers, exported files", f"ids of {len(plain)} texts that differ",
                float(differ), 0.0,
            )  # fmt: skip
        if kind == "sentencepiece":
            library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))
            differ = sum(library.EncodeAsIds(text) != ids for ids, text in zip(own, texts, strict=True))
            yield Check(
                "tokenizers", f"kind {kind}", "sentencepiece", "ids of 2,000 texts that differ", float(differ), 0.0
            )
        if kind == "hf":
            library = tokenizers.Tokenizer.from_file(str(folder / "t.json"))
            library.encode_special_tokens = True
            differ = sum(
                library.encode(text, add_special_tokens=False).ids != ids for ids, text in zip(own, texts, strict=True)
            )
            yield Check(
                "tokenizers", f"kind {kind}", "tokenizers", "ids of 2,000 texts that differ", float(differ), 0.0
            )
        if kind == "tiktoken":
            ranks = load_tiktoken_bpe(str(folder / "r.tiktoken"))
            pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
            library = tiktoken.Encoding("r", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            differ = sum(library.encode_ordinary(text) != ids for ids, text in zip(own, texts, strict=True))
            yield Check("tokenizers", f"kind {kind}", "tiktoken", "ids of 2,000 texts that differ", float(differ), 0.0)
        yield Check("tokenizers", f"kind {kind}", "the texts", "of 2,000 that do not come back", float(lost), 0.0)


def _export(out: pathlib.Path, tokenizer: Tokenizer) -> None:
    from memjax.interop.huggingface.written_tokenizer import write_tokenizer

    out.mkdir()
    write_tokenizer(out, tokenizer)


def tokenizers_of(folder: pathlib.Path) -> dict[str, Tokenizer]:
    """A tokenizer of each kind; their files are written by the libraries themselves."""
    corpus = [f"{prompt} the quick brown fox, naïve café {i}" for prompt in PROMPTS for i in range(9)]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.normalizer = normalizers.Sequence([])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    trained.train_from_iterator(corpus, trainer)
    description = json.loads(trained.to_str()) | {"normalizer": None}
    (folder / "t.json").write_text(json.dumps(description))
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(corpus), model_writer=pieces, model_type="bpe", vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "m.model").write_bytes(pieces.getvalue())
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" q", b" qu", b"ab", "é".encode(), b"  "]
    ranks = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / "r.tiktoken").write_bytes(ranks)
    files = {"hf": "t.json", "sentencepiece": "m.model", "tiktoken": "r.tiktoken"}
    opened = {
        kind: open_tokenizer(TokenizerConfig(kind=kind, path=str(folder / name)))  # pyright: ignore
        for kind, name in files.items()
    }
    return {"byte": ByteTokenizer(), "bpe": train_bpe(corpus, 400), **opened}


def odd_texts(count: int) -> list[str]:
    """Random strings of words, spaces, marks, scripts and control characters."""
    rng = np.random.default_rng(0)
    parts = [
        "the", "Cat", " ", "  ", "\n", "\t", "\r\n", "é", "e\u0301", "日本", "🙂", "👩\u200d👧", "<s>", "</s>", "<eos>",
        "12", "3.14", "'s", "don't", "①", "ﬁ", "\u00a0", "\u200b", "ß", "кот", "(", "]", "{}", "_", "…", "x" * 9,
    ]  # fmt: skip
    return ["".join(rng.choice(parts, rng.integers(1, 30))) for _ in range(count)]
