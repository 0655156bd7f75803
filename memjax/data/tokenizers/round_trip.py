"""Checks whether texts survive encoding and decoding: rejects unusable tokenizers, and lists what others lose."""

from memjax.data.tokenizers.base import Tokenizer

_PLAIN = ("the cat sat", "a b c", "The cat, again.")
_PROBES = {
    "line breaks": ("a\nb", "a\n\nb\n", "\na"),
    "carriage returns": ("a\r\nb",),
    "tabs": ("a\tb", "\ta"),
    "runs of spaces": ("a  b", "a    b"),
    "spaces at the start of a text": (" a", "  a"),
    "spaces at the end of a text": ("a ", "a  "),
    "no-break and other Unicode spaces": ("a\u00a0b", "a\u3000b", "a\u2009b"),
    "upper case": ("THE CAT", "The Cat"),
    "digits": ("12 345",),
    "punctuation": ("it 's , no . ! ? '' \" `` (a) [b] {c} #d @e $f %g ^h &i *j -k _l =m +n ~o |p \\q /r <s :t ;u",),
    "accents": ("café naïve Ærø ß",),
    "combining accents": ("cafe\u0301 n\u0303",),
    "compatibility characters (such as ①, ﬁ, ²)": ("①", "ﬁ", "²", "…", "™", "\uff21"),
    "other scripts": ("日本語", "Ελληνικά", "кошка", "القط", "고양이", "บ้าน", "नमस्ते"),
    "emoji": ("🙂", "👩\u200d👩\u200d👧", "🇫🇷"),
    "control and zero-width characters": ("a\x00b", "a\x07b", "a\u200bb", "a\ufeffb"),
    "the character ▁": ("a▁b",),
    "texts that spell tokens": ("<s> a </s>", "<unk>", "<pad>", "<eos>", "a</w> b", "a ##b", "<0x0A>", "Ġ Ċ"),
}
_SHOWN_ADDED = 3


def lost_in(tokenizer: Tokenizer) -> list[str]:
    """Describes what texts lose by encoding and decoding; empty if every probe round-trips exactly.

    Raises:
        ValueError: even plain English words do not round-trip, so the tokenizer is unusable.
    """
    returned = lambda text: tokenizer.decode(tokenizer.encode(text))
    for text in _PLAIN:
        found = returned(text)
        # Losing case, a few unknown characters, or spaces at either end leaves the text readable.
        if "\ufffd" not in found and found.strip().lower() != text.lower():
            raise ValueError(
                f"texts do not come back from its tokens: {text!r} becomes {found!r}; its pre-tokenizer, suffixes or "
                "normalizer drop or add text that decoding cannot restore, so use another tokenizer"
            )
    # Words added to the vocabulary may absorb the spaces around them.
    words = tokenizer.added_words[:_SHOWN_ADDED]
    probes = _PROBES | {f"spaces around {word!r}": (f"a {word} b", f"a{word}b") for word in words}
    lost = [name for name, texts in probes.items() if any(returned(text) != text for text in texts)]
    if extra := [text for text in ("the", "a b") if returned(text) == f"{text} "]:
        return [f"a space is added at the end ({extra[0]!r})", *lost]
    return lost


def probe_texts() -> list[str]:
    """The texts that `lost_in` encodes and decodes."""
    return [*_PLAIN, *(text for texts in _PROBES.values() for text in texts)]
