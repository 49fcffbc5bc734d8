"""The parameters of adapters: their modules, shapes and starting values."""

import math
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hycam.adapter.config import HyCAMConfig

ROUTER_STD = 0.02

# The parameters that are stacked over experts, or factors of the shared CAM; without their prefix, the op's
# arguments.
STACKED_NAMES = (
    "hycam_lora_a",
    "hycam_lora_n",
    "hycam_lora_b",
    "hycam_lora_a_bias",
    "hycam_lora_n_bias",
    "hycam_lora_b_bias",
    "hycam_expert_weight",
    "hycam_shared_lora_a",
    "hycam_shared_lora_n",
    "hycam_shared_lora_b",
)


class AdapterParameter(nn.Module):
    """One adapter's parameter, which its forward hands out.

    It is called to fetch the parameter, so that what loads parameters for a module's forward (FSDP, ZeRO, accelerate's
    offloading) finds the module that owns this one running.

    Attributes:
        has_saved_name: whether a state dict names it as a file does, but for the adapter's name.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.has_saved_name = False

    def forward(self) -> Tensor:
        return self.weight

    @property
    def shape(self) -> torch.Size:
        """What transformers' loader compares a file's tensor with."""
        return self.weight.shape

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.has_saved_name:
            destination[prefix.removesuffix(".")] = self.weight if keep_vars else self.weight.detach()
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)


class AdapterParameters(nn.ModuleDict):
    """One `AdapterParameter` per adapter name.

    A parameter's name goes on after the adapter's, as PEFT's do: what copies one adapter to another (TRL's reference)
    finds it by ``.default.``. `AdapterLayer.saved_name` leaves the ending out.
    """

    def use_saved_name(self, adapter_name: str) -> None:
        """Name an adapter's parameter in state dicts as a file does, but for the adapter's name."""
        parameter = self[adapter_name]
        assert isinstance(parameter, AdapterParameter)
        parameter.has_saved_name = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Where transformers' loader sets a parameter by its saved name, the module of that name takes it."""
        if isinstance(value, nn.Parameter) and name in self:
            self[name].weight = value
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self:
            if prefix + name in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Projection(nn.Module):
    """Weight and bias of one adapter's dense projection, either of which may be None; its forward hands them out."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        return self.weight, self.bias


class AdapterLayer(BaseTunerLayer):
    """What every adapted layer needs beyond PEFT's base class; its parameters are `AdapterParameters` and modules."""

    base_layer: nn.Module
    # those of its adapter_layer_names that are AdapterParameters
    stacked_names: ClassVar[Collection[str]]

    @classmethod
    def saved_name(cls, name: str) -> str:
        """The name that a file has for a parameter whose name in the model, but for the adapter's, is `name`."""
        stem = name.removesuffix(".weight")
        return stem if stem.rpartition(".")[2] in cls.stacked_names else name

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all adapters, without the wrapped layer's."""
        for name in self.adapter_layer_names:
            yield from getattr(self, name).parameters()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would also cast what was just loaded to the base layer's dtype, and knows no attention.
        target = device or placement(self.base_layer)[0]
        for name in self.adapter_layer_names:
            for key, parameter in getattr(self, name).named_parameters():
                if key.split(".")[0] == adapter_name and target.type != "meta":
                    parameter.data = parameter.data.to(target)


def stacked_shapes(config: HyCAMConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of those of `STACKED_NAMES` that the settings ask for."""
    d, r, experts = hidden_size, config.r, config.num_experts
    shapes = {
        "hycam_shared_lora_a": (r, d),
        "hycam_shared_lora_n": (r, r),
        "hycam_shared_lora_b": (d, r),
        "hycam_lora_a": (experts, r, d),
        "hycam_lora_n": (experts, r, r),
        "hycam_lora_b": (experts, d, r),
        "hycam_lora_a_bias": (experts, r),
        "hycam_lora_n_bias": (experts, r),
        "hycam_expert_weight": (experts, d, d),
        "hycam_lora_b_bias": (experts, d),
    }
    return {name: shapes[name] for name in parameter_names(config) if name in shapes}


def parameter_names(config: HyCAMConfig) -> list[str]:
    """Those of `STACKED_NAMES`, and of the projections, that the settings ask for."""
    names = []
    if config.shared == "full" or (config.shared == "slora" and config.bias):
        names.append("hycam_shared")
    if config.experts != "none":
        names.append("hycam_router")
    if config.shared == "slora":
        names += ["hycam_shared_lora_a", "hycam_shared_lora_n", "hycam_shared_lora_b"]
    if config.experts == "slora":
        names += ["hycam_lora_a", "hycam_lora_n", "hycam_lora_b"]
        if config.bias:
            names += ["hycam_lora_a_bias", "hycam_lora_n_bias"]
    if config.experts == "full":
        names.append("hycam_expert_weight")
    if config.experts != "none" and config.bias:
        names.append("hycam_lora_b_bias")
    return names


def projections(
    config: HyCAMConfig, hidden_size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Projection]:
    """Name -> projection: the shared CAM (zero) and the router (N(0, 0.02^2))."""
    made = {}
    names = parameter_names(config)
    if "hycam_shared" in names:
        weight = torch.zeros(hidden_size, hidden_size, device=device, dtype=dtype) if config.shared == "full" else None
        made["hycam_shared"] = Projection(weight, _zeros(config.bias, hidden_size, device, dtype))
    if "hycam_router" in names:
        router = torch.empty(config.num_experts, hidden_size, device=device, dtype=dtype).normal_(std=ROUTER_STD)
        made["hycam_router"] = Projection(router, _zeros(config.bias, config.num_experts, device, dtype))
    return made


@torch.no_grad()
def initialise(name: str, parameter: Tensor) -> None:
    """Start values: A and N Kaiming-uniform (a = sqrt 5), which is U(-1, 1) / sqrt(fan-in) of one expert's slice;
    zero else.

    """
    if name.endswith(("lora_a", "lora_n")):
        kaiming_uniform(parameter)
    else:
        nn.init.zeros_(parameter)


@torch.no_grad()
def kaiming_uniform(parameter: Tensor) -> None:
    """Kaiming-uniform (a = sqrt 5) of each matrix of a stack [..., out, in].

    The fan-in that `torch.nn.init` reads off a stacked tensor would be too large by the stack's size, hence matrix by
    matrix.
    """
    if parameter.is_meta:  # there are no values to draw, and a plan may have very many matrices
        return
    for matrix in parameter.flatten(0, -3) if parameter.ndim > 2 else (parameter,):
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))


def _zeros(wanted: bool, size: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    return torch.zeros(size, device=device, dtype=dtype) if wanted else None


def placement(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for adapters beside `module`: those of its first float parameter that can be trained in.

    A module whose weights accelerate has offloaded computes on its hook's device, not on the meta device that its
    parameters show; a quantised one holds integers or 8-bit floats, where the dtype of its model's configuration
    serves, or else the torch default dtype.
    """
    configured = getattr(getattr(module, "config", None), "dtype", None)
    device, dtype = torch.device("cpu"), configured or torch.get_default_dtype()
    for index, parameter in enumerate(module.parameters()):
        if index == 0:
            device = parameter.device
        if parameter.is_floating_point() and parameter.element_size() > 1:
            device, dtype = parameter.device, parameter.dtype
            break
    if device.type == "meta":
        for child in module.modules():
            execution_device = getattr(getattr(child, "_hf_hook", None), "execution_device", None)
            if execution_device is not None:
                return torch.device(execution_device), dtype
    return device, dtype
