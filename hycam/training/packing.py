"""Packed rows, of which a backbone is to make what it makes of each row alone."""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hycam.data.config import DataConfig
from hycam.errors import InputError
from hycam.evaluation.batches import base_model, device_of, evaluation_mode
from hycam.evaluation.rope import longrope_switch
from hycam.training.backbone import num_embeddings
from hycam.training.measure import own_draws

_TOKENS = 8
# Rows that are apart keep their very bits, but in a mixture of experts, whose products have other shapes when other
# tokens come: in float32 they move by 3e-7 of their size.
_LARGEST_CHANGE = 1e-6


def check_packing(config: PretrainedConfig, data: DataConfig, rows_at_once: int) -> None:
    """Raise `InputError` for packed rows that are so long that a backbone takes them for something else.

    Args:
        config: the backbone's.
        data: the recipe's, with packing.
        rows_at_once: bins in a process's micro-batch.
    """
    switch = longrope_switch(config)
    if switch is not None and data.max_length > switch:
        raise InputError(
            f"data.packing: got true with data.max_length: {data.max_length}, wanted at most {switch}: beyond it, "
            "longrope gives the rows beside a longer one other frequencies"
        )
    text = config.get_text_config()
    scale = getattr(text, "floor_scale", None) if getattr(text, "attn_temperature_tuning", None) else None
    if scale is not None and rows_at_once * data.max_length > scale:
        raise InputError(
            f"data.packing: got true with {rows_at_once} bins of {data.max_length} tokens in a micro-batch, wanted at "
            f"most {scale} tokens: beyond, the backbone scales its attention by the place in the micro-batch"
        )


class IsolatedRows(TrainerCallback):
    """Checks, before the first step, that the model keeps packed rows apart, under whichever engine it trains."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        check_isolation(model, autocast)


def check_isolation(model: nn.Module, autocast: torch.dtype | None = None) -> None:
    """Raise `InputError` where a row's logits change with the row before it.

    The model is called as training calls it: with positions that restart at each row, without a mask, and without a
    word about a cache.

    Args:
        model: a causal language model, adapted or not.
        autocast: what its own call computes in, where that is not its weights' dtype.
    """
    base: Any = base_model(model)
    vocabulary = num_embeddings(base.config)
    first, second = torch.randint(vocabulary, (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    device = device_of(model)
    positions = torch.arange(_TOKENS).repeat(2)[None].to(device)
    behind = []
    with evaluation_mode(model):
        for before in (first, (first + 1) % vocabulary):
            with own_draws(0, device):  # an adapter may draw noise in evaluation
                logits = model(input_ids=torch.cat([before, second])[None].to(device), position_ids=positions).logits
            behind.append(logits[0, _TOKENS:])
    change = ((behind[1] - behind[0]).norm() / behind[0].norm()).item()
    if not change <= max(_LARGEST_CHANGE, 2 * torch.finfo(autocast or base.dtype).eps):
        raise InputError(
            f"data.packing: got true, wanted false: {type(base).__name__} doesn't keep packed rows apart: a row's "
            f"logits change by {change:.0e} of their size with the row before it"
        )
