"""Special tokens that stand in a user's text: there they are text, and marks only where a template writes them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# What stands for a quoted token while a template is rendered: a place in Unicode that is never given a character.
_MARK = "\ufdd0"
_PLACE = re.compile(f"{_MARK}(\\d+){_MARK}")


class SpecialTokens:
    """A tokenizer's special tokens.

    Attributes:
        ids: text -> id of each.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.ids = {token.content: number for number, token in added if token.special}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else "((?!))")

    def quoted(self, row: Mapping[str, str]) -> "Quoted | None":
        """The row with the special tokens in its texts held apart; None where it has none."""
        tokens: list[str] = []

        def place(found: re.Match[str]) -> str:
            tokens.append(found[0])
            return f"{_MARK}{len(tokens) - 1}{_MARK}"

        marked = {name: self.pattern.sub(place, text) for name, text in row.items()}
        return Quoted(self, marked, tokens) if tokens else None


@dataclass(frozen=True)
class Quoted:
    """A row whose special tokens are held apart from those that a template adds.

    Attributes:
        special: the tokenizer's.
        row: its texts, with a mark in the place of each.
        tokens: their texts, by the marks' numbers.
    """

    special: SpecialTokens
    row: dict[str, str]
    tokens: list[str]

    def encode(self, text: str) -> list[int]:
        """The ids of what a template made of the row: its own special tokens as such, the row's as their text."""
        ids: list[int] = []
        for number, part in enumerate(self.special.pattern.split(text)):
            if number % 2:
                ids.append(self.special.ids[part])
            else:
                plain = _PLACE.sub(lambda place: self.tokens[int(place[1])], part)
                ids += encode_plain([plain], self.special.tokenizer)[0]
        return ids


def encode_plain(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of texts in which a special token is text too, and nothing around them."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids
