"""How each engine parts parameters, gradients and optimizer state between processes."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hycam.errors import InputError
from hycam.training.engines import find_deepspeed_settings
from hycam.training.recipe import Recipe

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")

# DeepSpeed's own values where its settings are silent (`DeepSpeedZeroConfig`), by the names of its settings.
ZERO_DEFAULTS: Mapping[str, Any] = {
    "reduce_bucket_size": 500_000_000,
    "contiguous_gradients": True,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
}
# Settings that part or place memory in ways that aren't counted here, with the values at which they do nothing.
_UNPLANNED_ZERO: Mapping[str, tuple[Any, ...]] = {
    "offload_param": (None,),
    "zero_hpz_partition_size": (None, 1),
    "zero_quantized_weights": (None, False),
    "zero_quantized_nontrainable_weights": (None, False),
    "mics_shard_size": (None, -1),
    "stage3_model_persistence_threshold": (None,),
}
_UNPLANNED_FSDP: Mapping[str, tuple[Any, ...]] = {
    "version": (None, 2),
    "cpu_offload": (None, False),
    "auto_wrap_policy": (None, "TRANSFORMER_BASED_WRAP"),
    "reshard_after_forward": (None, True),
    "activation_checkpointing": (None, False),
}


@dataclass(frozen=True)
class Engine:
    """What shares the work between processes.

    Attributes:
        name: one of `ENGINES`; "ddp" of one process is plain training.
        settings: DeepSpeed's `zero_optimization`, or FSDP's configuration.
        cast: the dtype that the engine casts parameters to before it computes with them, None for their own.
        autocast: the dtype that the forward pass runs under, None for no autocast.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    cast: torch.dtype | None = None
    autocast: torch.dtype | None = None

    @property
    def offloads_optimizer(self) -> bool:
        return (self.settings.get("offload_optimizer") or {}).get("device", "none") == "cpu"


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, without activations and optimizer state.

    Attributes:
        parameters: the model's parameters and buffers.
        gradients: what an accumulating backward pass leaves.
        masters: float32 copies that the optimizer works on.
        gathered: other processes' parameters, as far as they lie here for computing.
        buckets: buffers that gradients are exchanged through.
        optimized: the tensors that the optimizer sees.
    """

    parameters: int
    gradients: int
    masters: int
    gathered: int
    buckets: int
    optimized: list[Tensor]


def engine_of(recipe: Recipe, name: str | None = None) -> Engine:
    """The engine that the recipe's `trainer` section asks for, or the one of `ENGINES` called `name`.

    One that the recipe doesn't ask for has its defaults.

    Raises:
        InputError: settings that can't be read, or that this module can't count.
    """
    trainer = recipe.trainer
    half = torch.bfloat16 if trainer.get("bf16") else torch.float16 if trainer.get("fp16") else None
    settings: dict[str, Any] = {}
    deepspeed = find_deepspeed_settings(trainer.get("deepspeed"))
    if deepspeed is not None:
        settings = _read(deepspeed, "trainer.deepspeed")
        zero = settings.get("zero_optimization") or {}
        own = f"zero{zero.get('stage', 0)}"
        if name in (None, own):
            _check(zero, _UNPLANNED_ZERO, "trainer.deepspeed: zero_optimization")
            if own not in ENGINES:
                raise InputError(f"trainer.deepspeed: zero_optimization.stage: got {own[4:]}, which can't be planned")
            if (zero.get("offload_optimizer") or {}).get("device", "none") not in ("none", "cpu"):
                raise InputError("trainer.deepspeed: zero_optimization.offload_optimizer: only cpu can be planned")
            return Engine(own, zero, _zero_dtype(settings, half))
    if trainer.get("fsdp") and name in (None, "fsdp2"):
        fsdp = _read(trainer.get("fsdp_config") or {}, "trainer.fsdp_config")
        fsdp = {key.removeprefix("fsdp_"): value for key, value in fsdp.items()}
        _check(fsdp, _UNPLANNED_FSDP, "trainer.fsdp_config")
        return Engine("fsdp2", fsdp, cast=half, autocast=half)
    name = name or "ddp"
    # DeepSpeed casts the model itself instead of running it under autocast
    return Engine(name, cast=None if name == "ddp" else half, autocast=None if name.startswith("zero") else half)


def _read(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    path = Path(value)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {path}: can't be read: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{where}: {path}: got a {type(settings).__name__}, wanted an object")
    return settings


def _check(settings: Mapping[str, Any], unplanned: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, harmless in unplanned.items():
        value = settings.get(key)
        if isinstance(value, Mapping) and value.get("device") == "none":
            continue
        if value not in harmless:
            raise InputError(f"{where}.{key}: got {value!r}, which can't be planned")


def _zero_dtype(settings: Mapping[str, Any], half: torch.dtype | None) -> torch.dtype | None:
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        enabled = (settings.get(key) or {}).get("enabled", False)
        if enabled is True or (enabled == "auto" and half == dtype):
            return dtype
    return None


def partition(model: PeftModel | PreTrainedModel, engine: Engine, world_size: int) -> Memory:
    """What one of `world_size` processes holds of `model` (the adapted backbone, on fake tensors)."""
    if engine.name == "ddp":
        return _replicated(model, world_size)
    if engine.name == "fsdp2":
        return _fsdp2(model, engine, world_size)
    return _zero(model, engine, world_size)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, shared ones once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _frozen(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if not parameter.requires_grad]


def _replicated(model: nn.Module, world_size: int) -> Memory:
    trained = _trained(model)
    gradients = nbytes(trained)
    return Memory(
        parameters=nbytes([*model.parameters(), *model.buffers()]),
        gradients=gradients,
        masters=0,
        gathered=0,
        buckets=gradients if world_size > 1 else 0,  # each gradient is also in one of the reducer's buckets
        optimized=[parameter.detach() for parameter in trained],
    )


def _zero(model: PeftModel | PreTrainedModel, engine: Engine, world_size: int) -> Memory:
    """ZeRO keeps a float32 copy of the trained parameters in every stage, even where they are float32 themselves."""
    stage = int(engine.name[-1])
    trained, frozen = _trained(model), _frozen(model)
    settings = dict(ZERO_DEFAULTS) | _numbers(engine.settings, model.config.get_text_config().hidden_size)
    master = torch.empty(math.ceil(sum(p.numel() for p in trained) / world_size), dtype=torch.float32)
    part = math.ceil(nbytes(trained) / world_size)
    parameters, gathered = nbytes([*trained, *frozen]), 0
    if stage == 3:
        whole = settings["stage3_param_persistence_threshold"]
        parameters = sum(
            p.nbytes if p.numel() <= whole else math.ceil(p.numel() / world_size) * p.element_size()
            for p in model.parameters()
        )
        if world_size > 1:
            live = settings["stage3_max_live_parameters"] / max(1, sum(p.numel() for p in frozen))
            # trained parameters, once gathered, stay until the optimizer's step
            gathered = nbytes(trained) + int(nbytes(frozen) * min(1.0, live))
    on_device = 0 if engine.offloads_optimizer else 1
    buffers = 2 if stage < 3 and engine.settings.get("overlap_comm") else 1
    return Memory(
        parameters=parameters + nbytes(model.buffers()),
        gradients=nbytes(trained) if stage == 1 else part * on_device,
        masters=master.nbytes,
        gathered=gathered,
        buckets=buffers * settings["reduce_bucket_size"] * trained[0].element_size()
        if settings["contiguous_gradients"]
        else 0,
        optimized=[master],
    )


def _numbers(settings: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """The settings with the numbers that transformers puts where they say "auto"."""
    auto = {"reduce_bucket_size": hidden_size**2, "stage3_param_persistence_threshold": 10 * hidden_size}
    known = {key: value for key, value in settings.items() if key in ZERO_DEFAULTS}
    return {key: auto.get(key, ZERO_DEFAULTS[key]) if value == "auto" else value for key, value in known.items()}


def _fsdp2(model: PeftModel | PreTrainedModel, engine: Engine, world_size: int) -> Memory:
    """FSDP2 shards every parameter along its first dimension; a mixed-precision policy keeps what is trained in
    float32 and gathers it in the policy's dtype."""
    trained = [p.float() if engine.cast is not None else p for p in _trained(model)]
    shards = [_shard(parameter, world_size) for parameter in trained]
    gathered = 0
    if world_size > 1:
        layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
        largest = max(_computed(layer.parameters(), engine) for layer in layers)
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        rest = _computed((p for p in model.parameters() if id(p) not in inside), engine)
        gathered = 2 * largest + rest  # the layer that computes, the next one, and the root, which stays gathered
    return Memory(
        parameters=nbytes(_shard(p, world_size) for p in _frozen(model)) + nbytes(shards) + nbytes(model.buffers()),
        gradients=nbytes(shards),
        masters=0,
        gathered=gathered,
        buckets=max(_computed(_trained(layer), engine) for layer in layers) if world_size > 1 else 0,
        optimized=shards,
    )


def _shard(parameter: Tensor, world_size: int) -> Tensor:
    rows, *rest = parameter.shape
    return parameter.new_empty(math.ceil(rows / world_size), *rest)


def _computed(parameters: Iterable[Tensor], engine: Engine) -> int:
    """Bytes of parameters in the dtype that the engine computes in."""
    return sum(p.numel() * (p.element_size() if engine.cast is None else engine.cast.itemsize) for p in parameters)
