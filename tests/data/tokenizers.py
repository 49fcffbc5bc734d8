"""Tokenizers trained on a few sentences: byte-level BPE, and SentencePiece's way of writing blanks."""

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nName three colours.\n\n### Response:\nRed, green and blue.",
    "What is the capital of France? The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n",
] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]

# Each closes an answer in its own way; `{% generation %}` marks what an independent mask calls the answer.
CHAT_WITH_GENERATION = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token + '\\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CHAT_WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHAT_THAT_THINKS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>think:' }}{% endif %}"
)


def byte_tokenizer(*, adds: str = "", **kwargs) -> PreTrainedTokenizerFast:
    """Byte-level BPE. `adds`: what it puts around a text: "", "bos" or "bos eos"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer, pre_tokenizers.ByteLevel.alphabet(), adds, **kwargs)


def sentencepiece_tokenizer(*, adds: str = "bos", **kwargs) -> PreTrainedTokenizerFast:
    """BPE that writes a blank before every text, as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return _wrapped(tokenizer, sorted(string.printable), adds, **kwargs)


def _wrapped(tokenizer: Tokenizer, alphabet: list[str], adds: str, **kwargs) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*SPECIAL, "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if adds:
        around = {"bos": "<s> $A", "bos eos": "<s> $A </s>"}[adds]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "additional_special_tokens": SPECIAL[3:]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(named | kwargs))
