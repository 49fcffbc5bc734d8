"""A small Llama and its tokenizer, trained from scratch on general text: a backbone for runs without a download."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from hycam.data.documents import read_documents
from hycam.data.synthetic import general_text
from hycam.errors import InputError
from hycam.training.progress import progress_bar

_PAD, _BOS, _EOS = _SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>"]
# Roles are plain text, as a play's speakers: tokens of their own would be untrained in the frozen backbone.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].capitalize() + ':' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_WARMUP_SHARE = 0.05
_REPORTED_STEPS = 20


@dataclass
class ScratchConfig:
    """A tiny Llama, its text and its training.

    Attributes:
        corpus: `synthetic` (`hycam.data.synthetic.general_text`) or a JSON Lines file whose lines have a `text`.
        num_documents: how many documents are generated, or at most read from the file.
        vocab_size: of the byte-level BPE tokenizer, its bytes and special tokens included.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
            max_position_embeddings: as in transformers' `LlamaConfig`; embeddings are tied.
        steps: optimiser steps (AdamW, cosine schedule).
        batch_size: sequences in a step.
        sequence_length: tokens in a sequence; documents follow each other, so a sequence may begin inside one.
        learning_rate: the highest one.
    """

    corpus: str = "synthetic"
    num_documents: int = 10_000
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 512
    steps: int = 400
    batch_size: int = 16
    sequence_length: int = 128
    learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field.name}: got {value}, wanted at least 1")
        smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(_SPECIAL)
        if self.vocab_size < smallest:
            raise ValueError(f"vocab_size: got {self.vocab_size}, wanted at least {smallest}: bytes and special tokens")
        if self.hidden_size % (2 * self.num_attention_heads):
            wanted = f"a multiple of 2 x num_attention_heads = {2 * self.num_attention_heads}"
            raise ValueError(f"hidden_size: got {self.hidden_size}, wanted {wanted}")
        if self.num_key_value_heads is not None and self.num_attention_heads % self.num_key_value_heads:
            wanted = f"a divisor of num_attention_heads = {self.num_attention_heads}"
            raise ValueError(f"num_key_value_heads: got {self.num_key_value_heads}, wanted {wanted}")
        if not 2 <= self.sequence_length <= self.max_position_embeddings:
            wanted = f"2 to max_position_embeddings = {self.max_position_embeddings}"
            raise ValueError(f"sequence_length: got {self.sequence_length}, wanted {wanted}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate: got {self.learning_rate}, wanted a positive number")


def train_scratch_backbone(config: ScratchConfig, output_dir: str | Path, seed: int) -> Path:
    """Train tokenizer and model, and save both; a model that these settings gave before is used again.

    The folder, inside `output_dir`, is named after the settings, the seed and the text. It appears when it is whole, so
    a killed training leaves nothing that a later run would take. The caller's random state stays as it was.

    Returns:
        The folder, for `from_pretrained` (safetensors), with `training.json`: settings, tokens and losses.

    Raises:
        InputError: a corpus that can't be read, or with fewer tokens than a batch takes.
    """
    documents = _documents(config, seed)
    folder = Path(output_dir) / f"backbone-{_fingerprint(config, seed, documents)}"
    if folder.is_dir():
        return folder
    tokenizer = train_tokenizer(documents, config)
    sequences = _sequences(documents, tokenizer, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with device:
            model = _build(config, tokenizer)
        losses = _train(model, sequences, config, seed)
    record = {
        "settings": dataclasses.asdict(config),
        "seed": seed,
        "documents": len(documents),
        "tokens": sequences.numel(),
        "parameters": model.num_parameters(),
        "first_loss": losses[0],
        "last_loss": sum(losses[-_REPORTED_STEPS:]) / len(losses[-_REPORTED_STEPS:]),
    }
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(folder)
    return folder


def _documents(config: ScratchConfig, seed: int) -> list[str]:
    if config.corpus == "synthetic":
        return general_text(config.num_documents, seed)
    return read_documents(config.corpus, config.num_documents)


def _fingerprint(config: ScratchConfig, seed: int, documents: list[str]) -> str:
    settings = dataclasses.asdict(config) | {"corpus": hashlib.sha256(json.dumps(documents).encode()).hexdigest()}
    return hashlib.sha256(json.dumps([settings, seed], sort_keys=True).encode()).hexdigest()[:12]


def train_tokenizer(documents: list[str], config: ScratchConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, a begin token before every text, and a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, core.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        model_max_length=config.max_position_embeddings,
        chat_template=_CHAT_TEMPLATE,
    )


def _sequences(documents: list[str], tokenizer: PreTrainedTokenizerFast, config: ScratchConfig) -> torch.Tensor:
    """All documents, an end token after each, cut into [sequences, sequence_length]."""
    stream = [token for ids in tokenizer(documents)["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    count = len(stream) // config.sequence_length
    if count < config.batch_size:
        wanted = f"at least batch_size x sequence_length = {config.batch_size * config.sequence_length}"
        raise InputError(
            f"backbone.scratch: corpus: {len(stream)} tokens in {len(documents)} documents, wanted {wanted}"
        )
    return torch.tensor(stream[: count * config.sequence_length]).view(count, config.sequence_length)


def _build(config: ScratchConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return LlamaForCausalLM(scratch_model_config(config, vocab_size=len(tokenizer), **special))


def scratch_model_config(config: ScratchConfig, **fields: Any) -> LlamaConfig:
    """The configuration of the Llama that is trained; `fields` come from its tokenizer."""
    return LlamaConfig(
        **{"vocab_size": config.vocab_size} | fields,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=True,
    )


def _train(model: LlamaForCausalLM, sequences: torch.Tensor, config: ScratchConfig, seed: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(_WARMUP_SHARE * config.steps), config.steps)
    batches = _batches(sequences, config.batch_size, seed)
    losses: list[float] = []
    with progress_bar(config.steps, "training the backbone", "step") as bar:
        for _ in range(config.steps):
            batch = next(batches).to(model.device)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.2f}", refresh=False)
            bar.update()
    return losses


def _batches(sequences: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches without end; every pass over the sequences has its own order, and leaves out what fills no batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator)
        for rows in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
            yield sequences[rows]
