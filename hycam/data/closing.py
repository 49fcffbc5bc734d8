"""What ends an answer: in a training row, and wherever the trained model generates one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hycam.data.prompts import chat_response_text, prompt_text
from hycam.errors import InputError

_PROBE = {"instruction": "question", "input": "", "output": "hycam-probe"}


@dataclass(frozen=True)
class Closing:
    """How a prompt style ends an answer.

    Attributes:
        token_id: the token that does: the first one of the tokenizer's added tokens that the chat template writes after
            an answer, but for white space; the eos token where it writes none, and in the style `alpaca`.
        rendered: all text that the chat template writes after an answer.
        kept: what of it stands before that token. What follows the token is no part of a row: a generation that ended
            never comes to it.
        replaces: whether the eos token takes the place of a text with which the chat template closes answers.
        probe: prompt and response of a fixed row as they are rendered now: a chat template may write the day's date.
    """

    token_id: int
    rendered: str
    kept: str
    replaces: bool
    probe: tuple[str, str]

    def answer(self, row: Mapping[str, str], prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text between the chat template's prompt and the token that ends the row's answer.

        Raises:
            InputError: as `chat_response_text`, and where the template closes this row in another way.
        """
        response = chat_response_text(row, prompt, tokenizer)
        if not response.endswith(self.rendered):
            raise InputError(
                f"tokenizer: chat template: closes an answer with {response[-40:]!r}, others with {self.rendered!r}: "
                "wanted one closing for all"
            )
        return response.removesuffix(self.rendered) + self.kept


def closing_of(style: str, tokenizer: PreTrainedTokenizerBase) -> Closing:
    """How answers end in a prompt style.

    Raises:
        InputError: for an unknown style, and a tokenizer without a chat template, with one that refuses a row, or with
            one that doesn't write the answer.
    """
    prompt = prompt_text(_PROBE, style, tokenizer)
    if style == "alpaca":
        return Closing(tokenizer.eos_token_id, "", "", False, (prompt, _PROBE["output"]))
    response = chat_response_text(_PROBE, prompt, tokenizer)
    _, found, rendered = response.rpartition(_PROBE["output"])
    if not found:
        raise InputError(
            f"tokenizer: chat template: makes {response!r} of the answer {_PROBE['output']!r}, wanted the answer in it"
        )
    # not white space, which some tokenizers add (Gemma's line breaks, GPT-NeoX's runs of spaces): answers have it
    added = tokenizer.added_tokens_decoder.items()
    tokens = {token.content: number for number, token in added if not token.content.isspace()}
    ends = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    end = re.search(ends, rendered) if ends else None
    if end is not None:
        return Closing(tokens[end[0]], rendered, rendered[: end.start()], False, (prompt, response))
    return Closing(tokenizer.eos_token_id, rendered, "", bool(rendered.strip()), (prompt, response))
