"""A tokenizer.json means what the tokenizers library makes of it."""

import json

import pytest
import tokenizers

from memjax.data.tokenizers.hf import HfTokenizer

TEXTS = ["the cat sat", " naïve\n\n日本 x", "a catamaran, catamarans", "", "longer than four tokens of text"]


@pytest.fixture(scope="module")
def description(tokenizer_files) -> dict:
    return json.loads((tokenizer_files / "hf.json").read_text())


def test_ids_are_the_librarys_without_its_begin_token_and_its_cut(description):
    library = tokenizers.Tokenizer.from_str(json.dumps(description))
    library.no_truncation()
    tokenizer = HfTokenizer(description)
    assert library.encode(TEXTS[0]).ids[0] == tokenizer.bos_id
    for text in TEXTS:
        expected = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text == library.decode(expected)
    chat = "<|begin_of_text|>the cat<|eot_id|> sat"
    assert tokenizer.encode_with_special(chat) == library.encode(chat, add_special_tokens=False).ids
    assert tokenizer.vocab_size == library.get_vocab_size()


def test_older_files_name_no_type_of_the_model_and_write_merges_as_texts(description):
    model = {name: value for name, value in description["model"].items() if name != "type"}
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    older, newer = HfTokenizer({**description, "model": model}), HfTokenizer(description)
    assert [older.encode(text) for text in TEXTS] == [newer.encode(text) for text in TEXTS]


def test_special_tokens_have_the_ids_of_the_file(description):
    tokenizer = HfTokenizer(description, eos="<|eot_id|>")
    ids = {token["content"]: token["id"] for token in description["added_tokens"] if token["special"]}
    assert tokenizer.special_tokens == ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (ids["<|begin_of_text|>"], ids["<|eot_id|>"])
    assert tokenizer.fingerprint != HfTokenizer(description).fingerprint
    # An added word is not a special token.
    assert tokenizer.token_bytes(tokenizer.encode("catamaran")[0]) == b"catamaran"


def test_other_shapes_are_refused(description):
    for other in ([], {}, {"model": {"type": "Unigram"}}, {**description, "pre_tokenizer": None, "decoder": None}):
        with pytest.raises(ValueError, match=r"not a tokenizer\.json with a byte-level BPE"):
            HfTokenizer(other)
    with pytest.raises(ValueError, match="the tokenizers library cannot read it"):
        HfTokenizer({**description, "model": {"type": "BPE", "vocab": 3}})
    pieces = [{"SpecialToken": {"id": "<|eot_id|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    lacking = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {}}
    with pytest.raises(ValueError, match="the tokenizers library cannot read it"):
        HfTokenizer({**description, "post_processor": lacking})
    without = {token: index for token, index in description["model"]["vocab"].items() if token != "q"}
    with pytest.raises(ValueError, match="lacks 1 of the 256 bytes"):
        HfTokenizer({**description, "model": {**description["model"], "vocab": without}})


def test_a_special_token_that_texts_would_reach_is_refused(description):
    letters = {**description["model"]["vocab"]}
    added = [{"id": letters["q"], "content": "q", "special": True, "single_word": False, "lstrip": False}]
    added[0] |= {"rstrip": False, "normalized": False}
    end = [token for token in description["added_tokens"] if token["special"]]
    with pytest.raises(ValueError, match="texts that spell its special token q would encode to it"):
        HfTokenizer({**description, "added_tokens": added + end})


def test_dropout_that_was_left_in_the_file_is_off(description):
    drawn = {**description, "model": {**description["model"], "dropout": 0.5}}
    tokenizer = HfTokenizer(drawn)
    assert {tuple(tokenizer.encode("the cat sat on the mat")) for _ in range(20)} == {
        tuple(HfTokenizer(description).encode("the cat sat on the mat"))
    }


def test_special_tokens_that_strip_take_the_spaces_around_them(description):
    added = [{**token, "lstrip": True, "rstrip": True} for token in description["added_tokens"]]
    stripping = {**description, "added_tokens": added}
    library = tokenizers.Tokenizer.from_str(json.dumps(stripping))
    library.no_truncation()
    text = "the cat <|eot_id|> \nsat"
    ids = HfTokenizer(stripping).encode_with_special(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert len(ids) < len(HfTokenizer(description).encode_with_special(text))


def test_the_space_that_a_pre_tokenizer_prepends_is_removed_again(description):
    prefixed = {**description, "pre_tokenizer": {**description["pre_tokenizer"], "add_prefix_space": True}}
    tokenizer = HfTokenizer(prefixed)
    assert tokenizer.adds_leading_space
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert not HfTokenizer(description).adds_leading_space


def _with_word(description: dict, word: str, index: int) -> dict:
    vocab = {**description["model"]["vocab"], word: index}
    return {**description, "model": {**description["model"], "vocab": vocab}}


@pytest.mark.parametrize(
    ("word", "index", "message"),
    [
        ("a b", 400, "its word 'a b' has the letter ' ', which stands for no byte"),
        ("▁the", 400, "its word '▁the' has the letter '▁', which stands for no byte"),
        ("thecat", 5, "and 'thecat' have the same id|'thecat' and .* have the same id"),
        ("thecat", 2**31, r"has the token id 2147483648; ids must be in 0\.\.4194303"),
        ("thecat", 300_000_000, "has the token id 300000000"),
    ],
)
def test_vocabularies_that_no_byte_level_bpe_has_are_refused(word, index, message, description):
    with pytest.raises(ValueError, match=message):
        HfTokenizer(_with_word(description, word, index))


def test_an_added_token_whose_id_the_library_changes_is_refused(description):
    added = [{**token, "id": token["id"] + 50} for token in description["added_tokens"]]
    with pytest.raises(ValueError, match="which the tokenizers library does not give it"):
        HfTokenizer({**description, "added_tokens": added})
