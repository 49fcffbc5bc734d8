"""The text that a model reads, and the text that it is to write."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from hycam.data.config import check_prompt_style
from hycam.errors import InputError

# The published Stanford-Alpaca format, word for word: models tuned on it expect exactly this text.
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def prompt_text(row: Mapping[str, str], style: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text before the response: in training, in evaluation and in generation.

    `alpaca`: the Stanford-Alpaca template, in the form with or without input, up to `### Response:`.
    `chat`: the tokenizer's chat template of one user message (instruction, blank line, input) with its generation
    prompt, and without thoughts where the template knows `enable_thinking`.

    Raises:
        InputError: for an unknown style, and a tokenizer without a chat template or with one that refuses the row.
    """
    check_prompt_style(style)
    if style == "chat":
        return _render(_user_message(row), tokenizer, add_generation_prompt=True)
    template = _ALPACA_WITH_INPUT if row["input"].strip() else _ALPACA
    return template.format(instruction=row["instruction"], input=row["input"])


def chat_response_text(row: Mapping[str, str], prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template adds to `prompt` for the row's output: the output and the marks that close the turn.

    Raises:
        InputError: where the template with the answer doesn't begin with the template's generation prompt.
    """
    answer = {"role": "assistant", "content": row["output"]}
    conversation = _render([*_user_message(row), answer], tokenizer, add_generation_prompt=False)
    if not conversation.startswith(prompt):
        raise InputError(
            "tokenizer: chat template: a conversation with its answer doesn't begin with the generation prompt "
            f"{prompt[-40:]!r}, wanted a template where it does"
        )
    return conversation[len(prompt) :]


def _user_message(row: Mapping[str, str]) -> list[dict[str, str]]:
    content = f"{row['instruction']}\n\n{row['input']}" if row["input"].strip() else row["instruction"]
    return [{"role": "user", "content": content}]


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError("tokenizer: no chat template, wanted one for prompt: chat (or the data option prompt: alpaca)")
    try:
        # a template that lets a model think before it answers would have thoughts in training rows, which have none
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )
    except Exception as error:  # a template is a program: it may fail in any way
        raise InputError(f"tokenizer: chat template: {error}, wanted one that takes a user's message") from error
    assert isinstance(text, str)  # tokenize=False
    return text
