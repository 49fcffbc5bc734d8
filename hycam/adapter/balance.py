"""The balance loss (equations 10 and 14) where it reaches the router: in each layer's own backward pass.

Added to the model's loss it would be lost under reentrant checkpointing, whose first forward builds no graph, and
weighed wrongly by trainers that divide the loss themselves. So every layer injects the gradient of

    lambda * loss_scale * token_share * L_balance

where `loss_scale` is the gradient that arrived at the model's loss (whatever the trainer multiplied it by is in it)
and `token_share` the micro-batch's part of the target tokens that the loss is averaged over. Where the trainer makes
the loss outside the model, their product is what the trainer itself says (`hycam.adapter.trainers`). With n adapted
layers, load F_l and mean probability P_l of layer l, L_balance is ``mean_l(F_l . P_l)`` for the scope "layer" and
``mean_l(F_l) . mean_l(P_l)`` for "model" (all layers see the same tokens, so this pools their tokens). Both have the
gradient ``P / n`` for F_l and ``F / n`` for P_l, with the layer's own values or with the means.
"""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hycam.adapter.config import HyCAMConfig
from hycam.adapter.mixed_batch import RowAdapters
from hycam_kernels.output import DeferredRouterMeans, RouterMeans

# The keyword that takes the context from the model's call to its attention modules. Checkpointing keeps a layer's
# keywords, so a forward that the backward pass runs again meets its own context, not that of a later batch.
CONTEXT_KEYWORD = "hycam_context"


class Routing(NamedTuple):
    """One layer's routing: load [E] and router_prob [E]."""

    load: Tensor
    router_prob: Tensor


# what has a load and a router_prob
AnyRouting = Routing | RouterMeans | DeferredRouterMeans


class ForwardContext:
    """One forward pass of a model: what its HyCAM layers must know of it, and their routing.

    Not a dataclass: FSDP copies the dataclasses among a module's arguments, and the layers must share one object.

    Attributes:
        attention_mask: [batch, length] as the model received it, 0 for padding, or None.
        token_share: this micro-batch's part of the target tokens that the loss is averaged over.
        trainer_share: the same for a loss that is made outside the model.
        trainer_weight: the balance loss's factor where no loss tells its gradient; None where the caller is no trainer
            that tells it.
        layer_counts: adapter name -> number of layers that it adapts.
        is_compared: whether the calling trainer compares this pass with others, for which it must repeat: without the
            noise of training.
        loss_scale: the gradient that reached the model's loss; None until the backward pass gets there.
        is_tracked: whether the model's loss, or one given to `hycam.track_loss`, tells its gradient.
        row_adapters: the adapter of each row; None: the active adapters, for all rows.
        routing: adapter name -> layer name -> detached routing.
        in_graph: adapter name -> its settings, and layer name -> routing that has yet to join the loss (compiled
            layers).
        is_over: whether the model's call has ended: a layer that runs again does so for the backward pass.
        is_attached: whether the balance loss of compiled layers has joined the model's output instead.
        needs_tracking: whether a layer depends on `loss_scale`.
    """

    def __init__(
        self, layer_counts: dict[str, int], attention_mask: Tensor | None = None, token_share: Tensor | float = 1.0
    ) -> None:
        self.attention_mask = attention_mask
        self.token_share = self.trainer_share = token_share
        self.trainer_weight: Tensor | float | None = None
        self.layer_counts = layer_counts
        self.is_compared = False
        self.loss_scale: Tensor | float | None = None
        self.is_tracked = False
        self.row_adapters: RowAdapters | None = None
        self.routing: dict[str, dict[str, AnyRouting]] = {}
        self.in_graph: dict[str, tuple[HyCAMConfig, dict[str, Routing]]] = {}
        self.is_over = False
        self.is_attached = False
        self.needs_tracking = False
        # the layers of one call ask for the same one
        self._token_masks: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def token_mask(self, hidden: Tensor) -> Tensor | None:
        """[batch, length] bool, the tokens of `hidden` [batch, length, d] that aren't padding; None: all of them
        count.

        With a key-value cache the mask spans the cached tokens too; `hidden` is its last columns.
        """
        mask = self.attention_mask
        if mask is None:
            return None
        key = hidden.shape[:-1], hidden.device
        if not torch.compiler.is_compiling() and key in self._token_masks:
            return self._token_masks[key]
        if hidden.ndim != 3 or mask.shape[0] != hidden.shape[0] or mask.shape[1] < hidden.shape[1]:
            raise ValueError(
                f"attention_mask: got shape {tuple(mask.shape)} for hidden states {tuple(hidden.shape)}, want "
                "[batch, length] for [batch, length, hidden_size]"
            )
        # a copy: the router's means may be read after the caller has changed its mask
        counted = mask[:, mask.shape[1] - hidden.shape[1] :].to(hidden.device, torch.bool, copy=True)
        if not torch.compiler.is_compiling():
            self._token_masks[key] = counted
        return counted

    def record(self, adapter_name: str, layer_name: str, routing: AnyRouting) -> bool:
        """Keep a layer's detached routing. False where it is kept already: the backward pass runs the forward again."""
        layers = self.routing.setdefault(adapter_name, {})
        is_first = layer_name not in layers
        layers[layer_name] = routing
        return is_first

    def inject(
        self, hidden: Tensor, routing: Routing, adapter_name: str, layer_name: str, config: HyCAMConfig
    ) -> Tensor:
        """`hidden` unchanged; its backward pass adds the balance loss's gradient for `routing`, which is recorded."""
        if not torch.is_grad_enabled():
            # The first forward of a reentrant checkpoint: the second one, in the backward pass, injects.
            self.needs_tracking = True
            return hidden
        if not routing.load.requires_grad:
            return hidden
        if torch.compiler.is_compiling() and not self.is_over:
            # A compiled backward can't read what the loss's backward writes; the loss itself takes the gradient along,
            # or, where the trainer says its weight, the hidden states do.
            _, layers = self.in_graph.setdefault(adapter_name, (config, {}))
            layers[layer_name] = routing
            is_whole = config.balance_scope == "layer" or len(layers) == self.layer_counts[adapter_name]
            if self.trainer_weight is not None and is_whole:
                return _AttachLoss.apply(hidden, self._take_balance_loss(adapter_name) * self.trainer_weight)
            return hidden
        self.needs_tracking = True
        return _inject(hidden, routing, self, adapter_name, config)

    def track(self, loss: Tensor) -> Tensor:
        """`loss` as a new tensor whose backward pass tells the layers its gradient."""
        if self.is_attached:
            raise RuntimeError(
                "a compiled model without labels has attached its balance loss to its output already: pass it labels, "
                "so that the balance loss follows the model's own loss"
            )
        self.is_over = True
        if self.in_graph:
            balance = self._take_balance_losses()
            loss = loss + (balance - balance.detach()).to(loss)
        if torch.compiler.is_compiling() and not self.needs_tracking:
            return loss
        return _track(loss, self)

    def attach(self, output: Tensor) -> Tensor:
        """`output` unchanged; its backward pass adds the gradient of the compiled layers' balance loss, at scale 1."""
        self.is_over = self.is_attached = True
        return _AttachLoss.apply(output, self._take_balance_losses())

    def _take_balance_losses(self) -> Tensor:
        """The weighted balance loss of the layers in `in_graph`, which is empty from then on."""
        total: Tensor | None = None
        for adapter_name in list(self.in_graph):
            balance = self._take_balance_loss(adapter_name) * self.token_share
            total = balance if total is None else total + balance.to(total.device)
        assert total is not None
        return total

    def _take_balance_loss(self, adapter_name: str) -> Tensor:
        """The balance loss, with its coefficient, of one adapter's layers in `in_graph`, which they leave."""
        config, layers = self.in_graph.pop(adapter_name)
        if config.balance_scope == "model":
            mean = _mean(layers.values())
            return config.balance_coef * (mean.load * mean.router_prob).sum()
        device = next(iter(layers.values())).load.device
        losses = [(routing.load * routing.router_prob).sum().to(device) for routing in layers.values()]
        return config.balance_coef * torch.stack(losses).sum() / self.layer_counts[adapter_name]

    def gradient(self, adapter_name: str, routing: Routing, config: HyCAMConfig) -> Routing:
        """The balance loss's gradient for one layer's load and router_prob."""
        count = self.layer_counts[adapter_name]
        if config.balance_scope == "model":
            layers = self.routing[adapter_name]
            routing, count = _mean(layers.values(), routing.load.device), len(layers)
        weight = self._weight() * (config.balance_coef / count)
        if isinstance(weight, Tensor):
            weight = weight.to(routing.load)
        return Routing(routing.router_prob * weight, routing.load * weight)

    def _weight(self) -> Tensor | float:
        """The factor of the balance loss in what the backward pass started from."""
        if self.loss_scale is None and self.trainer_weight is not None:
            return self.trainer_weight
        if self.loss_scale is None:
            if self.is_tracked:
                warnings.warn(
                    "the backward pass doesn't come from the model's own loss, so the balance loss's gradient can't "
                    "follow its scale and is taken as is; pass your loss through hycam.track_loss(model, loss)",
                    stacklevel=2,
                )
            self.loss_scale = 1.0
        return self.token_share * self.loss_scale


def _mean(layers: Iterable[AnyRouting], device: torch.device | None = None) -> Routing:
    layers = [Routing(layer.load, layer.router_prob) for layer in layers]
    device = device or layers[0].load.device
    return Routing(
        *(torch.stack([value.to(device) for value in values]).mean(0) for values in zip(*layers, strict=True))
    )


# Their backward passes talk to each other through the context, which no compiled graph can: a model that is compiled in
# pieces gets a piece of its own for them.


@torch.compiler.disable
def _inject(
    hidden: Tensor, routing: Routing, context: ForwardContext, adapter_name: str, config: HyCAMConfig
) -> Tensor:
    return _InjectBalanceGradient.apply(hidden, *routing, context, adapter_name, config)


@torch.compiler.disable
def _track(loss: Tensor, context: ForwardContext) -> Tensor:
    context.is_tracked = True
    return _TrackLossGradient.apply(loss, context)


class _InjectBalanceGradient(torch.autograd.Function):
    """Identity on hidden; in the backward pass load and router_prob receive the balance loss's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        load: Tensor,
        router_prob: Tensor,
        context: ForwardContext,
        adapter_name: str,
        config: HyCAMConfig,
    ) -> Tensor:
        ctx.save_for_backward(load, router_prob)
        ctx.arguments = context, adapter_name, config
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        context, adapter_name, config = ctx.arguments
        gradient = context.gradient(adapter_name, Routing(*ctx.saved_tensors), config)
        return grad, gradient.load, gradient.router_prob, None, None, None


class _TrackLossGradient(torch.autograd.Function):
    """Copies the loss (trainers scale it in place) and, in the backward pass, notes the gradient that reaches it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, context: ForwardContext) -> Tensor:
        ctx.context = context
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.context.loss_scale = grad.detach()
        return grad, None


class _AttachLoss(torch.autograd.Function):
    """Identity on output; the loss beside it receives the gradient 1 whenever output receives one."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)
