"""Watches the balance loss's gradient under any trainer.

In a new adapter B is zero, so that the task's loss gives the routers no gradient: what they get is the balance loss's.
"""

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from tests.adapter.builders import config, plain_balance

TOLERANCE = 1e-4


def new_adapter(backbone: nn.Module, **settings: Any) -> PeftModel:
    return get_peft_model(backbone, config(**({"noise": "never", "balance_coef": 1.0} | settings))).train()


class Probe(TrainerCallback):
    """Keeps the micro-batches that a model is differentiated for, and its routers' gradients before the first step."""

    def __init__(self, model: PeftModel) -> None:
        self.start = copy.deepcopy(model)
        self.start.get_base_model().gradient_checkpointing_disable()  # whose second forward the plain loop doesn't see
        self.scope = model.peft_config[model.active_adapter].balance_scope
        self.micro_batches: list[dict[str, Tensor]] = []
        self.gradient: Tensor | None = None
        model.get_base_model().register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or self.gradient is not None:
            return
        kept = ("input_ids", "attention_mask", "position_ids", "labels")
        inputs = {name: kwargs[name].clone() for name in kept if isinstance(kwargs.get(name), Tensor)}
        if torch.is_grad_enabled():
            self.micro_batches.append(inputs)
        elif self.micro_batches:  # a second pass, for the log alone, may bring the labels along
            self.micro_batches[-1] = inputs | self.micro_batches[-1]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.gradient is None:
            self.gradient = router_gradient(model)

    def want(self, shares: list[float]) -> Tensor:
        """The gradient that a plain loop over the same micro-batches gives, each with its share."""
        assert len(shares) == len(self.micro_batches)
        self.start.zero_grad()
        for inputs, share in zip(self.micro_batches, shares, strict=True):
            # with a cache, positions that start anew would not part packed rows
            inputs = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
            with torch.random.fork_rng():
                (plain_balance(quiet(self.start), inputs, scope=self.scope)[1] * share).backward()
        return router_gradient(self.start)

    def error(self, shares: list[float]) -> float:
        """Largest deviation of the routers' gradients, relative to the largest entry."""
        assert self.gradient is not None
        want = self.want(shares)
        return float((self.gradient - want).abs().max() / want.abs().max())


def quiet(model: PeftModel) -> PeftModel:
    """`model` without its own balance loss."""
    for settings in model.peft_config.values():
        settings.balance_coef = 0.0
    return model


def router_gradient(model: nn.Module) -> Tensor:
    grads = [p.grad for n, p in model.named_parameters() if "hycam_router" in n and p.requires_grad]
    return torch.cat([grad.detach().flatten().clone() for grad in grads])
