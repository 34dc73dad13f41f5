"""From text to token numbers, as uncased BERT models want it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

WORDS = 30522
PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


class WordPiece:
    """The greedy longest-match tokenizer of uncased BERT models, for text of ASCII characters."""

    def __init__(self, vocabulary: Mapping[str, int]):
        self.vocabulary = vocabulary

    def __call__(self, text: str, length: int) -> list[int]:
        """Token numbers, between the two marks and padded to `length`."""
        ids = [self.vocabulary[BEGIN]]
        for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()):
            ids += self._pieces(word)
            if len(ids) >= length - 1:
                break
        ids = [*ids[: length - 1], self.vocabulary[END]]
        return ids + [self.vocabulary[PAD]] * (length - len(ids))

    def _pieces(self, word: str) -> list[int]:
        pieces, start = [], 0
        while start < len(word):
            for stop in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:stop]
                if piece in self.vocabulary:
                    pieces.append(self.vocabulary[piece])
                    start = stop
                    break
            else:
                return [self.vocabulary[UNKNOWN]]
        return pieces


def hashed(text: str, length: int) -> list[int]:
    """A token a word, by its hash: where there is no vocabulary."""
    words = re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())[:length]
    ids = [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in words]
    return ids + [0] * (length - len(ids))
