"""The engines that train over several processes: which one a recipe names, and what their launchers leave to do."""

import importlib.resources
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from hycam.errors import InputError, RunStoppedError
from hycam.training.schema import suggest


def packaged_engines() -> dict[str, Path]:
    """Name -> file of the DeepSpeed settings that ship."""
    folder = importlib.resources.files("hycam") / "engines"
    return {Path(str(file)).stem: Path(str(file)) for file in folder.iterdir() if file.name.endswith(".json")}


def deepspeed_settings(value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """What `TrainingArguments.deepspeed` takes, from a name that ships, a JSON file's path or the settings themselves.

    Raises:
        InputError: neither a file nor a name that ships, or DeepSpeed is not installed.
    """
    if value and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "trainer.deepspeed: deepspeed is not installed, wanted: pip install 'hycam-kernels[deepspeed]'"
        )
    return find_deepspeed_settings(value)


def find_deepspeed_settings(value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """`deepspeed_settings` without DeepSpeed, which reading settings doesn't need."""
    if not value:
        return None
    if isinstance(value, str):
        known = packaged_engines()
        if value in known:
            return str(known[value])
        if not Path(value).is_file():
            raise InputError(
                f"trainer.deepspeed: {value!r} is neither a file nor one that ships{suggest(value, known)}"
            )
    return value


def check_gpus(count: int, launch: str) -> None:
    """Raise `InputError` where one process sees several GPUs, which transformers would fill with replicas in threads.

    A step would take that many times the rows, and every replica would draw the same noise.

    Args:
        count: GPUs that this process would use.
        launch: how to start a process for each.
    """
    if count > 1:
        raise InputError(
            f"one process sees {count} GPUs, wanted a process for each: {launch}; or one GPU: CUDA_VISIBLE_DEVICES=0"
        )


def check_launcher(deepspeed: bool, fsdp: bool, source: str) -> None:
    """Raise `InputError` for an engine that no launcher has told of its processes; one process is told too."""
    if (deepspeed or fsdp) and "LOCAL_RANK" not in os.environ:
        name = "deepspeed" if deepspeed else "fsdp"
        raise InputError(
            f"trainer.{name}: needs a launcher, for one process too: "
            f"torchrun --standalone --nproc_per_node 1 -m hycam train {source}"
        )


def check_checkpointing(arguments: TrainingArguments) -> None:
    """Raise `InputError` for gradient checkpointing that would draw other noise in the forward that it repeats."""
    if arguments.fsdp and arguments.fsdp_plugin_args.get("activation_checkpointing"):
        raise InputError(
            "trainer.fsdp_config.activation_checkpointing: true given, wanted trainer.gradient_checkpointing instead: "
            "accelerate's own doesn't restore the random state, so the repeated forward would draw other noise"
        )
    settings = arguments.gradient_checkpointing_kwargs
    if isinstance(settings, dict) and settings.get("preserve_rng_state") is False:
        raise InputError(
            "trainer.gradient_checkpointing_kwargs.preserve_rng_state: false given, wanted true: the repeated forward "
            "would draw other noise"
        )


@contextmanager
def timeouts_told() -> Iterator[None]:
    """Turn a collective, or a first meeting, that failed or timed out into one line that says so."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain one
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise RunStoppedError(
            "another process ended, hangs, or did not answer within trainer.ddp_timeout; the last good checkpoint is "
            f"kept ({str(error).splitlines()[0]})"
        ) from error


def limit_deepspeed_waits(seconds: float) -> None:
    """Give the group that DeepSpeed's collectives run in `trainer.ddp_timeout`; made by itself, it has PyTorch's."""
    from deepspeed.utils import groups
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timedelta(seconds=seconds), groups._get_data_parallel_group())


def fsdp_backend(trainer: Mapping[str, Any]) -> str | None:
    """What FSDP's processes on GPUs talk through; None: what transformers chooses.

    NCCL alone can't reduce what `fsdp_config.cpu_offload` keeps on the host.
    """
    launched = int(os.environ.get("LOCAL_RANK", "-1")) != -1
    if trainer.get("fsdp") and not trainer["use_cpu"] and launched and torch.cuda.is_available():
        return "cpu:gloo,cuda:nccl"
    return None


def join_processes(trainer: Mapping[str, Any]) -> None:
    """Join the launcher's processes on CPUs, with `trainer.ddp_timeout` as the longest wait for another one.

    On GPUs transformers does this; on CPUs it would leave the timeout out.

    Raises:
        InputError: the launcher asks for an engine that the recipe doesn't name.
    """
    for engine, field in (("DEEPSPEED", "deepspeed"), ("FSDP", "fsdp")):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true" and not trainer.get(field):
            raise InputError(
                f"trainer.{field}: not set, but the launcher asks for {engine}: the recipe names the engine"
            )
    if trainer["use_cpu"] and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        timeout = trainer.get("ddp_timeout", TrainingArguments.ddp_timeout)
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def whole(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter on the CPU, gathered where FSDP2 has it in parts."""
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
