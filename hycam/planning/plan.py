"""The memory of a run per process, before anything is loaded."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from hycam.errors import InputError
from hycam.evaluation.batches import base_model
from hycam.planning.activations import Activations, trace_activations
from hycam.planning.engines import Engine, nbytes, partition
from hycam.training.backbone import build_model, check_max_length
from hycam.training.prepare import adapted, check_sharding
from hycam.training.recipe import Recipe

# Fields that ask for hardware or processes that aren't here when a run is planned; the engine accounts for them.
_ELSEWHERE = ("deepspeed", "fsdp", "fsdp_config", "bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval")
# Fields that change what a step holds in ways that the trace doesn't see.
_UNPLANNED = ("torch_compile", "parallelism_config", "optim_target_modules", "auto_find_batch_size")

# What glibc's allocator holds free between activations, as a share of them: it fits a tensor into the place of a freed
# one of the same size only where a neighbour is free too. The share differs from method to method, and from run to run.
# A GPU's peak is what is allocated, so it has no such part.
_HELD_FREE = 1 / 6


@dataclass(frozen=True)
class Plan:
    """Bytes of one process.

    Attributes:
        engine: its name in `ENGINES`.
        world_size: number of processes, one for each GPU.
        trained, total: parameters by number.
        dtypes: what backbone, adapter (where there is one) and matrix products are in.
        parameters, gradients, optimizer: what is kept of each; the optimizer's float32 copies are in its own.
        activations: the peak of what lives in a forward and a backward pass beside the above.
        saved_activations: the part of it that lives between the two.
        gathered: other processes' parameters, as far as they lie here for computing.
        buckets: buffers that gradients are exchanged through.
        host: optimizer state that lies in the host's memory instead.
    """

    engine: str
    world_size: int
    trained: int
    total: int
    dtypes: dict[str, str]
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    saved_activations: int
    gathered: int
    buckets: int
    host: int

    @property
    def sum(self) -> int:
        """Bytes of the process on its GPU."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.gathered + self.buckets

    def on_cpu(self, process: int) -> int:
        """Bytes of host memory where the process computes on a CPU.

        Args:
            process: its own, as `process_bytes` gives them.
        """
        return self.sum + process + int(_HELD_FREE * self.activations)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"sum": self.sum}


def plan_memory(recipe: Recipe, config: PretrainedConfig, engine: Engine, world_sizes: list[int]) -> list[Plan]:
    """What one process of a run holds, for each number of processes.

    Backbone and adapter are built from `config` and run on fake tensors, so every family that transformers knows is
    counted from its own modules. A micro-batch has `trainer.per_device_train_batch_size` rows, all of `data.max_length`
    tokens.

    Raises:
        InputError: for a recipe with settings that can't be planned, by name.
    """
    _check_plannable(recipe)
    check_sharding(recipe.method, sharded=engine.name != "ddp", parted=engine.name in ("zero3", "fsdp2"))
    check_max_length(config, recipe.data.max_length, recipe.backbone.name_or_path or "backbone.scratch")
    arguments = arguments_here(recipe)
    model = adapted(build_model(recipe.backbone, config), recipe.method).train()
    with FakeTensorMode():
        _put_on_fake_tensors(model)
        backbone_dtype = next(model.parameters()).dtype
        if engine.name.startswith("zero"):
            _cast(model, engine.cast)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        counts = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
        dtypes = {"backbone": backbone_dtype}
        if isinstance(model, PeftModel):
            dtypes["adapter"] = trained[0].dtype
        memories = [partition(model, engine, world_size) for world_size in world_sizes]
        states = [_state_bytes(memory.optimized, arguments) for memory in memories]
        _cast(model, engine.cast)
        activations = _trace(model, recipe, arguments, engine)
        dtypes["products"] = engine.autocast or engine.cast or next(iter(model.parameters())).dtype
    names = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
    plans = []
    for world_size, memory, state in zip(world_sizes, memories, states, strict=True):
        optimizer = memory.masters + state
        plans.append(
            Plan(
                engine=engine.name,
                world_size=world_size,
                trained=counts[0],
                total=counts[1],
                dtypes=names,
                parameters=memory.parameters,
                gradients=memory.gradients,
                optimizer=0 if engine.offloads_optimizer else optimizer,
                activations=activations.peak,
                saved_activations=activations.saved,
                gathered=memory.gathered,
                buckets=memory.buckets,
                # the offloaded optimizer reads its gradients there too
                host=optimizer + memory.masters if engine.offloads_optimizer else 0,
            )
        )
    return plans


def _check_plannable(recipe: Recipe) -> None:
    if recipe.backbone.liger:
        raise InputError("backbone.liger: got true, which can't be planned: its kernels only run on a GPU")
    if recipe.backbone.quantization is not None:
        raise InputError(f"backbone.quantization: got {recipe.backbone.quantization!r}, which can't be planned")
    for name in _UNPLANNED:
        if recipe.trainer.get(name):
            raise InputError(f"trainer.{name}: got {recipe.trainer[name]!r}, which can't be planned")


def arguments_here(recipe: Recipe) -> TrainingArguments:
    """The recipe's training arguments as far as a machine without its GPUs takes them."""
    here = {name: value for name, value in recipe.trainer.items() if name not in _ELSEWHERE}
    stripped = dataclasses.replace(recipe, trainer=here | {"use_cpu": True, "report_to": "none"})
    stripped.source = recipe.source
    return stripped.training_arguments()


def _put_on_fake_tensors(model: nn.Module) -> None:
    """From the meta device to the active mode's CPU; tied tensors stay tied."""
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for holder in holders:
            for name, tensor in holder.items():
                if isinstance(tensor, Tensor):
                    if tensor not in fakes:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        fakes[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                    holder[name] = fakes[tensor]


def _cast(model: PeftModel | PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Parameters alone: engines leave buffers as they are."""
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)


def _trace(
    model: PeftModel | PreTrainedModel, recipe: Recipe, arguments: TrainingArguments, engine: Engine
) -> Activations:
    if arguments.gradient_checkpointing:
        options: dict[str, Any] = {"use_reentrant": False}
        if isinstance(arguments.gradient_checkpointing_kwargs, dict):
            options |= arguments.gradient_checkpointing_kwargs
        # fake generators have no state to restore
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options | {"preserve_rng_state": False})
        model.enable_input_require_grads()
    try:
        return trace_activations(model, _longest_batch(recipe, arguments), engine.autocast)
    except RuntimeError as error:  # a family's own code may read values, or call an operator that fake tensors lack
        name, dtype = type(base_model(model)).__name__, model.dtype
        reason = str(error).partition("\n")[0]
        raise InputError(f"backbone: got {name} in {dtype}, which can't be planned: {reason}") from error


def _longest_batch(recipe: Recipe, arguments: TrainingArguments) -> dict[str, Tensor]:
    rows, length = arguments.per_device_train_batch_size, recipe.data.max_length
    shape = (1, rows * length) if recipe.data.packing else (rows, length)
    inside = "position_ids" if recipe.data.packing else "attention_mask"
    return {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels", inside)}


def _state_bytes(parameters: list[Tensor], arguments: TrainingArguments) -> int:
    """Bytes of the optimizer's state after a step on `parameters` (fake tensors)."""
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        for leaf in leaves:
            leaf.grad = torch.empty_like(leaf)
        # fused or not, an optimizer has the same state
        optimizer = optimizer_class(leaves, **{name: value for name, value in options.items() if name != "fused"})
        optimizer.step()
    except Exception as error:  # each optimizer has its own reasons not to run here
        name = getattr(arguments.optim, "value", arguments.optim)
        raise InputError(f"trainer.optim: got {name}, which can't be planned: {error}") from error
    return nbytes(value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
