"""The hooks that connect a model's call with its HyCAM layers: padding mask, loss scale, residual stream, norms."""

import inspect
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hycam.adapter.architectures import model_type_of, residual_norm, trained_norms
from hycam.adapter.attention import HyCAMAttention
from hycam.adapter.balance import CONTEXT_KEYWORD, ForwardContext
from hycam.adapter.calls import ModelCalls
from hycam.adapter.config import HyCAMConfig, is_finite
from hycam.adapter.mixed_batch import RowAdapters, WrapperRows
from hycam.adapter.norm_fusion import NormFusion, fusible_norms
from hycam.adapter.threads import Latest
from hycam.adapter.trainers import calling_trainer, share, shifts_labels, step_average, target_count, traced_trainer
from hycam.errors import InputError

_ATTRIBUTE = "hycam_binding"


@dataclass(frozen=True)
class RouterStatistics:
    """One layer's routing in its last forward.

    Attributes:
        load: [E] float32 (float64 where the model is), mean routing weight of each expert over the counted tokens.
        balance_loss: scalar, equation 10.
        tokens: 0-d int64, the counted tokens.
    """

    load: Tensor
    balance_loss: Tensor
    tokens: Tensor


class Binding:
    """The hooks on one model and what they share with its HyCAM layers.

    Attributes:
        layers: the model's HyCAM layers, by path.
        calls: the model's calls, as its layers see them.
    """

    def __init__(self, model: nn.Module, layers: dict[str, HyCAMAttention]) -> None:
        self.layers = layers
        parameters = inspect.signature(model.forward).parameters
        self._parameter_names = list(parameters)
        self._shifts_labels = shifts_labels(model)
        self._takes_keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.calls = ModelCalls(
            layers.values(),
            takes_keywords=self._takes_keywords,
            tensor_parallel_size=getattr(model, "_tp_size", None) or 1,
        )
        # track_loss may follow passes without gradients, of a reference for example
        self.differentiated: Latest[ForwardContext] = Latest()
        self._told_no_loss = self._told_noise = False
        self._handles: list[RemovableHandle | NormFusion] = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            # a call that fails ends too
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]
        for name, layer in layers.items():
            layer.calls, layer.layer_name = self.calls, name
            if any(config.modulation == "residual" for config in layer.adapter_configs.values()):
                self._tap_residual(model, name, layer)
            if any(config.fuse_norm for config in layer.adapter_configs.values()):
                decoder_layer = model.get_submodule(name.rpartition(".")[0])
                model_type = model_type_of(layer.base_layer) or model_type_of(model)
                norms, kind = fusible_norms(decoder_layer, model_type)
                self._handles += [NormFusion(norm, kind, layer) for norm in norms]

        mix_rows = WrapperRows(self.calls.row_adapters)
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                self._handles.append(module.register_forward_hook(mix_rows, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off the model and its layers."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers.values():
            layer.calls = None

    def _tap_residual(self, model: nn.Module, name: str, layer: HyCAMAttention) -> None:
        norm_name = residual_norm(model_type_of(layer.base_layer) or model_type_of(model))
        decoder_layer = model.get_submodule(name.rpartition(".")[0])
        norm = decoder_layer.get_submodule(norm_name)
        self._handles.append(norm.register_forward_pre_hook(layer.record_residual))

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = self._arguments(args, kwargs)
        check_forward_arguments(arguments)
        mask = arguments.get("attention_mask")
        context = ForwardContext(
            self.calls.layer_counts(),
            mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            self._token_share(arguments),
        )
        if model.training:
            self._ask_trainer(context, arguments)
        self.calls.begin(context)
        if torch.is_grad_enabled():
            self.differentiated.set(context)
        return (args, kwargs | {CONTEXT_KEYWORD: context}) if self._takes_keywords else None

    def _ask_trainer(self, context: ForwardContext, arguments: dict[str, Any]) -> None:
        """Take over what the calling trainer, if there is one, says of this call."""
        needs_weight = torch.is_grad_enabled() and self._has_balance_loss()
        if torch.compiler.is_compiling():
            kind = traced_trainer()
            context.is_compared = kind == "compares"
            # with both, the model's own loss is divided by the step's targets, and the graph's loss takes it along
            knows_share = arguments.get("labels") is not None and arguments.get("num_items_in_batch") is not None
            if kind and needs_weight and not knows_share:
                like = next(value for value in arguments.values() if isinstance(value, Tensor))
                context.trainer_share, context.trainer_weight = step_average(like, self._shifts_labels).unbind()
            return
        trainer = calling_trainer()
        if trainer is None:
            return
        context.is_compared = trainer.compares
        if trainer.compares and self._draws_noise_always():
            self._tell_noise(trainer.name)
        if needs_weight and (average := trainer.average(self._shifts_labels)) is not None:
            context.trainer_share, context.trainer_weight = average

    def _token_share(self, arguments: dict[str, Any]) -> Tensor | float:
        """This call's part of the target tokens that `num_items_in_batch` counts; 1 where it isn't passed."""
        num_items = arguments.get("num_items_in_batch")
        if num_items is None:
            return 1.0
        targets = target_count(arguments, self._shifts_labels)
        return 1.0 if targets is None else share(targets, num_items)

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.calls.end()
        context = kwargs.get(CONTEXT_KEYWORD, self.calls.context)
        if output is None:
            return None
        assert context is not None
        if not (model.training and torch.is_grad_enabled() and self._has_balance_loss()):
            return None
        if (found := _first_tensor(output, wants_loss=True)) is not None:
            key, loss = found
            return _replaced(output, key, context.track(loss))
        if context.trainer_weight is None:
            self._tell_no_loss()
        if context.in_graph and (found := _first_tensor(output, wants_loss=False)) is not None:
            key, tensor = found
            return _replaced(output, key, context.attach(tensor))
        context.is_over = True
        return None

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._parameter_names, args, strict=False)) | kwargs

    def _has_balance_loss(self) -> bool:
        return any(config.balance_coef > 0 and config.experts != "none" for config in self._active_configs())

    def _draws_noise_always(self) -> bool:
        return any(config.noise == "always" and config.experts != "none" for config in self._active_configs())

    def _active_configs(self) -> Iterator[HyCAMConfig]:
        for layer in self.layers.values():
            if not layer.disable_adapters:
                yield from (layer.adapter_configs[n] for n in layer.active_adapters if n in layer.adapter_configs)

    def _tell_noise(self, trainer: str) -> None:
        if not self._told_noise:
            self._told_noise = True
            warnings.warn(
                f"{trainer} compares passes of the model, which noise='always' makes differ: set noise='never'",
                stacklevel=2,
            )

    def _tell_no_loss(self) -> None:
        if not self._told_no_loss:
            self._told_no_loss = True
            warnings.warn(
                "the model returns no loss whose scale the balance loss could follow: its gradient is taken as is; "
                "pass labels to the model, or write loss = hycam.track_loss(model, loss) before backward",
                stacklevel=2,
            )


def bind(model: nn.Module, *, freeze: bool = True) -> nn.Module:
    """Connect the HyCAM layers of `model`, wrapped by hand, with its calls; to be called after the last one is wrapped.

    From then on padding doesn't count in the routing (by the [batch, length] `attention_mask` that the model is called
    with; a mask of another form says nothing about padding), the balance loss follows the gradient that reaches the
    model's loss, and `balance_scope="model"`, `modulation="residual"`, `train_norms` and `fuse_norm` work. Adapters
    added through PEFT are bound already.

    Args:
        model: the model whose forward takes `attention_mask` and `labels`; changed in place.
        freeze: freeze every parameter but the adapters' own (and the norms that `train_norms` trains).

    Returns:
        `model`.

    Raises:
        InputError: (a ValueError) where the model has no HyCAM layer, or its residual stream or norms aren't known.
    """
    if isinstance(model, PeftModel):
        install(model.get_base_model())
        return model
    layers = install(model)
    if not layers:
        raise InputError(
            f"model: got {type(model).__name__} without a HyCAMAttention, want one whose attentions are wrapped"
        )
    if freeze:
        _freeze(model, layers)
    return model


def install(model: nn.Module) -> dict[str, HyCAMAttention]:
    """Put the hooks on `model` in place of those that are there; returns its HyCAM layers."""
    uninstall(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HyCAMAttention)}
    if layers:
        setattr(model, _ATTRIBUTE, Binding(model, layers))
    return layers


def uninstall(model: nn.Module) -> None:
    """Take HyCAM's hooks off `model`, where there are any."""
    binding = model.__dict__.pop(_ATTRIBUTE, None)
    if binding is not None:
        binding.remove()


@contextmanager
def each_row_by(model: nn.Module, row_adapters: RowAdapters) -> Iterator[None]:
    """Let the calls of the bound `model` in this thread use the adapters of `row_adapters`."""
    slot = getattr(model, _ATTRIBUTE).calls.row_adapters
    slot.set(row_adapters)
    try:
        yield
    finally:
        slot.set(None)


def track_loss(model: nn.Module, loss: Tensor, *, share: Tensor | float | None = None) -> Tensor:
    """`loss`, computed outside the model from its last forward, as a tensor whose gradient the balance loss follows.

    Where the model itself returns the loss this happens by itself, and so it does under a trainer of transformers or
    TRL, whatever makes its loss.

    Args:
        model: the model, bound.
        loss: scalar.
        share: this micro-batch's part, from 0 to 1, of what `loss` is divided by, where that is counted over several
            micro-batches: its target tokens by those of the optimizer step. None: as the calling trainer divides, or
            without one, `loss` is a mean over this micro-batch.

    Raises:
        InputError: (a ValueError) where the model isn't bound or has not run, or for another share.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    binding = model.__dict__.get(_ATTRIBUTE)
    context = None if binding is None else binding.differentiated.get()
    if context is None:
        raise InputError(
            f"model: got {type(model).__name__} that is not bound or has not run, want one after hycam.bind"
        )
    if not (share is None or isinstance(share, Tensor) or (is_finite(share) and 0 <= share <= 1)):
        raise InputError(f"share: got {share!r}, want a tensor or a number from 0 to 1")
    context.token_share = context.trainer_share if share is None else share
    return context.track(loss)


def router_statistics(model: nn.Module, adapter_name: str | None = None) -> dict[str, RouterStatistics]:
    """Routing of the last forward, by path of the adapted layers, in layer order.

    Where several threads call the model, of the last forward of the thread that asks; a thread that made none gets what
    each layer keeps of any thread's last one.

    Args:
        model: a model with HyCAM layers.
        adapter_name: the adapter; None: the active one.

    Raises:
        InputError: (a ValueError) where the adapter isn't there, or several are active and none is named.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HyCAMAttention)}
    if adapter_name is None:
        active = {name for layer in layers.values() for name in layer.active_adapters if name in layer.adapter_configs}
        if len(active) > 1:
            raise InputError(f"adapter_name: got none while {', '.join(sorted(active))} are active, want one of them")
        adapter_name = next(iter(active), None)
    if not any(adapter_name in layer.adapter_configs for layer in layers.values()):
        raise InputError(f"adapter_name: got {adapter_name!r}, want an adapter of the model")
    statistics = {}
    for name, layer in layers.items():
        latest = layer.statistics.get(adapter_name or "")
        kept = None if latest is None else latest.get()
        if kept is None:
            continue
        tokens = torch.tensor(kept.num_tokens) if kept.token_mask is None else kept.token_mask.sum()
        statistics[name] = RouterStatistics(kept.load, kept.balance_loss, tokens)
    return statistics


def check_forward_arguments(arguments: dict[str, Any]) -> None:
    """Refuse PEFT's per-sample arguments where they would go unheeded."""
    for name in ("adapter_names", "task_ids"):
        if arguments.get(name) is not None:
            raise InputError(f"{name}: got a value, want none: the active adapters apply to the whole batch")


def _freeze(model: nn.Module, layers: dict[str, HyCAMAttention]) -> None:
    kept = {id(p) for layer in layers.values() for p in layer.adapter_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    for name, layer in layers.items():
        if any(config.train_norms for config in layer.adapter_configs.values()):
            decoder_layer = model.get_submodule(name.rpartition(".")[0])
            for norm in trained_norms(model_type_of(layer.base_layer) or model_type_of(model)):
                decoder_layer.get_submodule(norm).requires_grad_(True)


def _first_tensor(output: Any, *, wants_loss: bool) -> tuple[Any, Tensor] | None:
    """The loss in a model's output with its key (or attribute), else its first differentiable tensor; None without one.

    The output is a mapping, a tuple, a tensor, or an object with attributes; a tuple has its loss first.
    """
    if isinstance(output, Tensor):
        candidates: dict[Any, Any] = {None: output}
    elif isinstance(output, tuple):
        candidates = dict(enumerate(output[:1] if wants_loss else output))
    else:
        candidates = dict(output) if isinstance(output, MutableMapping) else dict(vars(output))
        if wants_loss:
            candidates = {"loss": candidates.get("loss")}
    for key, value in candidates.items():
        if isinstance(value, Tensor) and value.requires_grad and (value.ndim == 0 or not wants_loss):
            return key, value
    return None


def _replaced(output: Any, key: Any, tensor: Tensor) -> Any:
    """`output` with `tensor` at `key`, changed in place where that is possible."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (*output[:key], tensor, *output[key + 1 :])
    if isinstance(output, MutableMapping):
        output[key] = tensor
    else:
        setattr(output, key, tensor)
    return output
