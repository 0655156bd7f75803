"""Merges equal those by hand; patterns split texts as their vocabularies are known to."""

import base64
import json
import re

import pytest

from memjax.data.tokenizers.hf import HfTokenizer
from memjax.data.tokenizers.tiktoken import PATTERNS, TiktokenTokenizer

NAMES = ("<|begin_of_text|>", "<|end_of_text|>")


def build(content: bytes, pattern: str = "gpt2", **options) -> TiktokenTokenizer:
    return TiktokenTokenizer.of_file(content, pattern=pattern, special_tokens=NAMES, **options)


def by_hand(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Repeatedly merges the adjacent pair with the lowest rank."""
    parts = [bytes([byte]) for byte in word]
    while pairs := [i for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks]:
        best = min(pairs, key=lambda i: ranks[parts[i] + parts[i + 1]])
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [ranks[part] for part in parts]


def test_words_are_merged_by_rank(tokenizer_files):
    content = (tokenizer_files / "ranks.tiktoken").read_bytes()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in content.splitlines()}
    words = ["the", " cat", " that", "'s", " café", " 日本", " 123", "!?", "  ", " x"]
    expected = [rank for word in words for rank in by_hand(word.encode(), ranks)]
    assert build(content).encode("".join(words)) == expected


def test_special_tokens_come_after_the_ranks(tokenizer_files):
    content = (tokenizer_files / "ranks.tiktoken").read_bytes()
    tokenizer = build(content)
    count = len(content.splitlines())
    assert tokenizer.special_tokens == {NAMES[0]: count, NAMES[1]: count + 1}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (count, count + 1, count + 2)
    assert build(content, eos=NAMES[0]).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("pattern", "pieces"),
    [
        ("gpt2", ["We", "'ll", " pay", " 12345", " €", "\n\n", " ok"]),
        ("cl100k", ["We", "'ll", " pay", " ", "123", "45", " €\n\n", " ok"]),
        ("o200k", ["We'll", " pay", " ", "123", "45", " €\n\n", " ok"]),
    ],
)
def test_patterns_cut_texts_as_their_vocabularies_do(pattern, pieces, tokenizer_files):
    """If every substring of a text is a token, only the pattern splits it."""
    lines = (tokenizer_files / "ranks.tiktoken").read_bytes()
    count = len(lines.splitlines())
    whole, known = "".join(pieces), []
    for length in range(2, len(whole) + 1):
        known += [whole[i : i + length].encode() for i in range(len(whole) - length + 1)]
    known = [token for token in dict.fromkeys(known) if base64.b64encode(token) + b" " not in lines]
    for number, token in enumerate(known):
        lines += base64.b64encode(token) + b" %d\n" % (count + number)
    tokenizer = build(lines, pattern)
    assert [tokenizer.token_bytes(token).decode() for token in tokenizer.encode(whole)] == pieces


def test_a_tokenizer_json_in_llamas_shape_says_the_same(tokenizer_files):
    """Both libraries get one vocabulary and one pattern; a trained BPE numbers its ids in the order of the merges."""
    description = json.loads((tokenizer_files / "hf.json").read_text())
    description["model"]["ignore_merges"] = True
    description["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERNS["cl100k"]}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    llama = HfTokenizer(description)
    lines = [base64.b64encode(llama.token_bytes(i)) + b" %d" % i for i in range(len(description["model"]["vocab"]))]
    tokenizer = build(b"\n".join(lines), "cl100k")
    for text in ("the cat's naïve\n\n  café 12345", "日本語の\r\n def f(x):\n\treturn x  # x", "<|eot_id|> THE CAT'S"):
        assert tokenizer.encode(text) == llama.encode(text)


def test_anything_but_a_file_of_ranks_is_refused(tokenizer_files):
    content = (tokenizer_files / "ranks.tiktoken").read_bytes()
    for wrong in (b"?? 3\n", b"eA==\n", b"eA== x\n"):
        with pytest.raises(ValueError, match=re.escape("line 265 is not a token in base 64 and its rank")):
            build(content + wrong)
    with pytest.raises(ValueError, match="1 of the 256 bytes are not tokens"):
        build(b"\n".join(content.splitlines()[1:]))
    with pytest.raises(ValueError, match="two tokens have the same rank"):
        build(content + base64.b64encode(b"xyz") + b" 3\n")
    assert set(PATTERNS) == {"gpt2", "cl100k", "o200k"}


def test_an_empty_token_keeps_its_rank_and_decodes_to_nothing(tokenizer_files):
    """Whisper's multilingual vocabulary ends with an empty token, written as base64 padding only."""
    content = (tokenizer_files / "ranks.tiktoken").read_bytes() + b"= 264\n"
    tokenizer = TiktokenTokenizer.of_file(content, pattern="gpt2", special_tokens=("<|endoftext|>",))
    assert tokenizer.eos_id == 265
    assert tokenizer.decode([*tokenizer.encode("the cat"), 264]) == "the cat"


@pytest.mark.parametrize("rank", [-1, 2**31, 5_000_000])
def test_ranks_that_no_vocabulary_has_are_refused(rank, tokenizer_files):
    content = (tokenizer_files / "ranks.tiktoken").read_bytes() + b"eHh4 %d\n" % rank
    with pytest.raises(ValueError, match=f"has the token id {rank}"):
        TiktokenTokenizer.of_file(content, pattern="gpt2", special_tokens=("<|endoftext|>",))
