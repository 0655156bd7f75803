"""Records in memory, and the training pairs expected of them."""

from collections.abc import Sequence

from memjax.data.sources.records import Record, Records

BOS, EOS = 1, 2
"""The special tokens of the byte tokenizer."""


class Listed(Records):
    """Records from a list."""

    def __init__(self, records: Sequence[Record]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def pairs_by_hand(record: Record) -> list[tuple[int, int, float]]:
    """Lists (token, target, counts) for each position of a record but the last; tokens are bytes."""
    tokens, counts = [BOS], [False]
    for text, learned in record:
        for letter in text:
            tokens.append(ord(letter) + 3)
            counts.append(learned)
    tokens.append(EOS)
    counts.append(record[-1].learned)
    return [(tokens[i], tokens[i + 1], float(counts[i + 1])) for i in range(len(tokens) - 1)]
