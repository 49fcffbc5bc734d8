import pytest
from jinja2 import TemplateError

from hycam.data.prompts import chat_response_text, prompt_text
from hycam.errors import InputError
from tests.data.tokenizers import CHAT_THAT_THINKS, CHAT_WITH_BOS, CHAT_WITH_GENERATION, byte_tokenizer

ROW = {"instruction": "Add {them}.", "input": "1, 2", "output": "3"}
NO_INPUT = {"instruction": "Say hi.", "input": " \n", "output": "hi"}


def test_alpaca_with_input():
    assert prompt_text(ROW, "alpaca", byte_tokenizer()) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Add {them}.\n"
        "\n"
        "### Input:\n"
        "1, 2\n"
        "\n"
        "### Response:"
    )


def test_alpaca_without_input():
    assert prompt_text(NO_INPUT, "alpaca", byte_tokenizer()) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Say hi.\n"
        "\n"
        "### Response:"
    )


def test_chat_prompt_and_response():
    tokenizer = byte_tokenizer(chat_template=CHAT_WITH_GENERATION)
    prompt = prompt_text(ROW, "chat", tokenizer)
    assert prompt == "<|user|>\nAdd {them}.\n\n1, 2\n<|assistant|>\n"
    assert chat_response_text(ROW, prompt, tokenizer) == "3</s>\n"
    assert prompt_text(NO_INPUT, "chat", tokenizer) == "<|user|>\nSay hi.\n<|assistant|>\n"
    tokenizer.chat_template = CHAT_WITH_BOS
    prompt = prompt_text(NO_INPUT, "chat", tokenizer)
    assert prompt == "<s><|user|>Say hi.<|end|><|assistant|>"
    assert chat_response_text(NO_INPUT, prompt, tokenizer) == "hi<|end|>"


def test_chat_errors():
    with pytest.raises(InputError, match="no chat template, wanted one for prompt: chat"):
        prompt_text(ROW, "chat", byte_tokenizer())
    tokenizer = byte_tokenizer(chat_template=CHAT_THAT_THINKS)
    with pytest.raises(InputError, match=r"doesn't begin with the generation prompt .*think:"):
        chat_response_text(ROW, prompt_text(ROW, "chat", tokenizer), tokenizer)
    tokenizer.chat_template = "{{ raise_exception('system message wanted') }}"
    with pytest.raises(InputError, match="chat template: system message wanted") as caught:
        prompt_text(ROW, "chat", tokenizer)
    assert isinstance(caught.value.__cause__, TemplateError)


def test_chat_template_runs_in_a_sandbox():
    tokenizer = byte_tokenizer(chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="chat template"):
        prompt_text(ROW, "chat", tokenizer)


def test_unknown_style():
    with pytest.raises(InputError, match="prompt: 'vicuna', wanted one of alpaca, chat"):
        prompt_text(ROW, "vicuna", byte_tokenizer())
