"""Self-attention with HyCAM adapters around it."""

import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hycam.adapter.architectures import hidden_size_of
from hycam.adapter.balance import CONTEXT_KEYWORD, ForwardContext, Routing
from hycam.adapter.calls import ModelCalls
from hycam.adapter.config import HyCAMConfig
from hycam.adapter.parameters import (
    STACKED_NAMES,
    AdapterLayer,
    AdapterParameter,
    AdapterParameters,
    initialise,
    parameter_names,
    placement,
    projections,
    stacked_shapes,
)
from hycam.adapter.threads import Latest, PerThread
from hycam.errors import InputError
from hycam_kernels import norm_project
from hycam_kernels.modulation import modulate
from hycam_kernels.output import DeferredOutput, DeferredRouterMeans, RouterMeans

# what the op wants to be told of even where there is none
_POSITIONAL = ("shared_weight", "lora_a", "lora_n", "lora_b", "router_weight")
# what a fused norm multiplies h by, in the op's place
_PROJECTED = ("hycam_lora_a", "hycam_lora_n", "hycam_router")

# The models (by their configuration) whose user was told that HyCAM layers run unbound: one warning each.
_told_unbound: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class LayerStatistics(NamedTuple):
    """One layer's routing in its last forward: detached load [E] and balance loss, which may be made when they're read,
    and the counted tokens, as mask or number."""

    means: RouterMeans | DeferredRouterMeans
    token_mask: Tensor | None
    num_tokens: int

    @property
    def load(self) -> Tensor:
        return self.means.load

    @property
    def balance_loss(self) -> Tensor:
        return self.means.balance_loss


class HyCAMAttention(nn.Module, AdapterLayer):
    """A self-attention module whose output HyCAM modulates (CIKM 2025, equations 2-12).

    Calls the attention as the model does, takes h from its `hidden_states` (keyword, or first argument) and replaces
    the first element of its result, h_att [batch, length, d], by ``h_att + h_att * A_fusion(h)``. Attributes that it
    lacks are the attention's. Several active adapters apply one after the other.

    Args:
        attention: the module to wrap, which is frozen; its forward returns a tuple, the output [..., d] first. The
            adapter takes its device, dtype and `training`.
        config: the adapter's settings.
        hidden_size: d; None: as the attention's own configuration says.
        adapter_name: name of the adapter.

    Raises:
        InputError: (a ValueError) where the hidden size can't be found.
        TypeError: in forward, where the attention doesn't return (output, ...).
        RuntimeError: in forward, where the settings need `hycam.bind` and the model isn't bound.
    """

    adapter_layer_names = ("hycam_shared", "hycam_router", *STACKED_NAMES)
    stacked_names = STACKED_NAMES
    other_param_names = ("adapter_configs", "statistics")

    def __init__(
        self,
        attention: nn.Module,
        config: HyCAMConfig,
        hidden_size: int | None = None,
        *,
        adapter_name: str = "default",
    ) -> None:
        super().__init__()
        hidden_size = hidden_size or hidden_size_of(attention)
        if hidden_size is None:
            raise InputError(
                f"hidden_size: got none for {type(attention).__name__}, and no configuration tells, want an integer"
            )
        self.base_layer = attention.requires_grad_(False)
        self.training = attention.training
        self.hidden_size = hidden_size
        self.hycam_shared = nn.ModuleDict().train(self.training)
        self.hycam_router = nn.ModuleDict().train(self.training)
        for name in STACKED_NAMES:
            setattr(self, name, AdapterParameters().train(self.training))
        self.adapter_configs: dict[str, HyCAMConfig] = {}
        self.statistics: dict[str, Latest[LayerStatistics]] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.calls: ModelCalls | None = None
        self.layer_name = ""
        # what the norm that runs just before the attention leaves for it: the decoder layer's input h_in, and V and the
        # router's logits of the fused adapter
        self.hidden_in: PerThread[Tensor] = PerThread()
        self.projections: PerThread[tuple[Tensor, Tensor]] = PerThread()
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: HyCAMConfig, inference_mode: bool = False) -> None:
        """Add an adapter, freshly initialised; it is active only where it is the active adapter by name."""
        device, dtype = placement(self.base_layer)
        for name, projection in projections(config, self.hidden_size, device, dtype).items():
            getattr(self, name)[adapter_name] = projection.train(self.training)
        for name, shape in stacked_shapes(config, self.hidden_size).items():
            parameter = AdapterParameter(torch.empty(shape, device=device, dtype=dtype))
            initialise(name, parameter.weight)
            getattr(self, name)[adapter_name] = parameter.train(self.training)
        self.adapter_configs[adapter_name] = config
        self.statistics[adapter_name] = Latest()
        if not config.train_router:
            self.frozen_peft_weight_names[adapter_name] = ("hycam_router",)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def record_residual(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the norm whose input is the residual stream h_in."""
        self.hidden_in.set(args[0])

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        context = kwargs.pop(CONTEXT_KEYWORD, None)
        residual, projections = self.hidden_in.take(), self.projections.take()
        attention: Any = self._modules["base_layer"]
        output = attention(*args, **kwargs)
        if self.disable_adapters:
            return output
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        attn_output = self._checked_output(output, hidden)
        if context is None and self.calls is not None:
            context = self.calls.context_without_keyword()
        if context is not None and context.row_adapters is not None:
            return (self._adapt_rows(hidden, attn_output, residual, context), *output[1:])
        fused = self.fused_adapter()
        for adapter_name in self.active_adapters:
            if adapter_name in self.adapter_configs:
                given = projections if adapter_name == fused else None
                attn_output = self._adapt(adapter_name, hidden, attn_output, residual, context, given)
        return (attn_output, *output[1:])

    @torch.no_grad()
    def modulation(self, hidden_states: Tensor, adapter_name: str | None = None) -> Tensor:
        """A_fusion [..., d] of `hidden_states` [..., d], noise-free: the factor by which an attention output grows."""
        adapter_name = adapter_name or self.active_adapters[0]
        if adapter_name not in self.adapter_configs:
            raise InputError(f"adapter_name: got {adapter_name!r}, want one of {', '.join(self.adapter_configs)}")
        # With h_att = 0 and h_in = 1 the output is A_fusion itself, without the rounding of 1 + A_fusion.
        zeros = torch.zeros_like(hidden_states)
        return self._modulate(adapter_name, hidden_states, zeros, residual=torch.ones_like(zeros)).hidden_states

    def _adapt_rows(
        self, hidden: Tensor, attn_output: Tensor, residual: Tensor | None, context: ForwardContext
    ) -> Tensor:
        """Each row by the adapter that the call names for it; rows of the base model stay as they are, and so do those
        of an adapter that isn't in this layer."""
        assert context.row_adapters is not None
        adapted = attn_output
        for adapter_name, rows in context.row_adapters.rows(hidden.shape[0], hidden.device).items():
            if adapter_name in self.adapter_configs:
                part = self._adapt(adapter_name, hidden, attn_output, residual, context, None, rows)
                adapted = adapted.index_copy(0, rows, part)
        return adapted

    def _adapt(
        self,
        adapter_name: str,
        hidden: Tensor,
        attn_output: Tensor,
        residual: Tensor | None,
        context: ForwardContext | None,
        projections: tuple[Tensor, Tensor] | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        config = self.adapter_configs[adapter_name]
        if context is None:
            context = self._unbound_context(adapter_name, config)
        if config.modulation == "residual" and residual is None:
            raise RuntimeError(
                "modulation='residual': the norm before the attention did not run; after replacing norms, bind "
                "the model again: hycam.bind(model)"
            )
        if self.training and projections is None and adapter_name == self.fused_adapter():
            raise RuntimeError(
                "fuse_norm=True: the norm before the attention did not make its projections; after replacing norms, "
                "bind the model again: hycam.bind(model)"
            )
        token_mask = context.token_mask(hidden)
        if rows is not None:
            hidden, attn_output = hidden[rows], attn_output[rows]
            residual, token_mask = (None if value is None else value[rows] for value in (residual, token_mask))
        modulated, means = self._modulate(
            adapter_name,
            hidden,
            attn_output,
            residual=residual if config.modulation == "residual" else None,
            token_mask=token_mask,
            seed=self._noise_seed(config, hidden.device, context),
            projections=projections,
        )
        if config.experts == "none":
            return modulated
        kept = means if isinstance(means, DeferredRouterMeans) else RouterMeans(*(value.detach() for value in means))
        if context.record(adapter_name, self.layer_name, kept) and not _is_exported():
            self.statistics[adapter_name].set(LayerStatistics(kept, token_mask, hidden.shape[:-1].numel()))
        if self.training and config.balance_coef > 0:
            routing = Routing(means.load, means.router_prob)
            return context.inject(modulated, routing, adapter_name, self.layer_name, config)
        return modulated

    def _modulate(self, adapter_name: str, hidden: Tensor, attn_output: Tensor, **options: Any) -> DeferredOutput:
        """The op with the adapter's parameters, fetched anew: sharded training swaps them between forwards."""
        config = self.adapter_configs[adapter_name]
        weights = self._weights(adapter_name, config, are_projected=options.get("projections") is not None)
        if config.shared == "slora":
            a, n, b = (weights.pop(f"shared_lora_{factor}") for factor in "anb")
            with torch.autocast(hidden.device.type, enabled=False):
                weights["shared_weight"] = b @ (n @ a)
        return modulate(
            hidden,
            attn_output,
            tau=config.tau,
            hard=config.routing == "hard",
            scale=config.scale,
            recompute=config.recompute,
            backend=config.backend,
            training=self.training,
            **weights,
            **options,
        )

    def _weights(self, adapter_name: str, config: HyCAMConfig, *, are_projected: bool) -> dict[str, Any]:
        """The adapter's parameters by the op's names, and the factors of a low-rank shared CAM; without those that the
        norm has multiplied by, where it ``are_projected``.

        Modules that the settings leave empty aren't called: a call takes longer than many of the op's steps.
        """
        weights: dict[str, Any] = dict.fromkeys(_POSITIONAL)
        modules = self._modules
        for name in parameter_names(config):
            if are_projected and name in _PROJECTED:
                continue
            module: Any = modules[name]
            argument, fetched = name.removeprefix("hycam_"), module[adapter_name]()
            if name in STACKED_NAMES:
                weights[argument] = fetched
            else:
                weights[f"{argument}_weight"], weights[f"{argument}_bias"] = fetched
        return weights

    def fused_adapter(self) -> str | None:
        """The adapter whose projections the norm makes: of the active ones the first with `fuse_norm`, in training.

        Not in evaluation, where a few tokens at a time are bound by reading the weights: the op's decoding kernels read
        each once, in two launches, and take no projections.
        """
        if not self.training or self.disable_adapters:
            return None
        names = (name for name in self.active_adapters if name in self.adapter_configs)
        return next((name for name in names if self.adapter_configs[name].fuse_norm), None)

    def project(
        self, adapter_name: str, hidden_in: Tensor, norm_weight: Tensor, **options: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """h [..., d] of the decoder layer's input, and V [..., E, r] and logits [..., E] by the adapter."""
        router_weight, _ = self._projection("hycam_router", adapter_name)
        assert router_weight is not None
        weights = self.hycam_lora_a[adapter_name](), self.hycam_lora_n[adapter_name](), router_weight
        backend = self.adapter_configs[adapter_name].backend
        hidden, v, logits = norm_project(hidden_in, norm_weight, *weights, backend=backend, **options)
        return hidden, (v, logits)

    def _projection(self, name: str, adapter_name: str) -> tuple[Tensor | None, Tensor | None]:
        modules = getattr(self, name)
        return modules[adapter_name]() if adapter_name in modules else (None, None)

    def _noise_seed(self, config: HyCAMConfig, device: torch.device, context: ForwardContext) -> Tensor | None:
        """A 0-d int64 seed from the device's generator, whose state checkpointing restores; never read on the host."""
        if config.experts == "none" or config.noise == "never":
            return None
        if config.noise == "train" and (context.is_compared or not self.training):
            return None
        seed = torch.randint(2**62, (), device=device)
        rank = self.calls.data_parallel_rank() if self.calls is not None else 0
        return seed ^ (rank * 0x1E3779B97F4A7C15 % 2**62)

    def _unbound_context(self, adapter_name: str, config: HyCAMConfig) -> ForwardContext:
        """The context of a layer whose model isn't bound."""
        for is_needed, setting in (
            (config.balance_scope == "model" and config.experts != "none", "balance_scope='model'"),
            (config.modulation == "residual", "modulation='residual'"),
            (config.train_norms, "train_norms=True"),
            (config.fuse_norm, "fuse_norm=True"),
        ):
            if is_needed:
                raise RuntimeError(
                    f"{setting} needs the whole model: call hycam.bind(model) after wrapping its attentions"
                )
        model_config = getattr(self.base_layer, "config", None)
        if self.training and config.balance_coef > 0 and config.experts != "none":
            _tell_unbound(self if model_config is None else model_config)
        return ForwardContext({adapter_name: getattr(model_config, "num_hidden_layers", 1)})

    def _checked_output(self, output: Any, hidden: Tensor) -> Tensor:
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].shape == hidden.shape:
            return output[0]
        got = type(output).__name__
        if isinstance(output, tuple) and output:
            got = f"({', '.join(str(tuple(o.shape)) if isinstance(o, Tensor) else type(o).__name__ for o in output)})"
        raise TypeError(
            f"HyCAM wraps self-attention: {type(self.base_layer).__name__} {self.layer_name} returned {got}, want a "
            f"tuple whose first element has the shape of its hidden states, {tuple(hidden.shape)}"
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("HyCAM can't be merged into the backbone: its modulation depends on the input")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def _tell_unbound(owner: Any) -> None:
    """Warn once for each `owner`, the configuration that a model's attentions share."""
    if _told_unbound.get(id(owner)) is not owner:
        _told_unbound[id(owner)] = owner
        warnings.warn(
            "HyCAM layers run without hycam.bind(model): padding counts in the balance loss, and its gradient doesn't "
            "follow the scale of the model's loss",
            stacklevel=2,
        )


def _is_exported() -> bool:
    """Whether the forward is traced by `torch.export`, whose tensors have no values and end with it."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
