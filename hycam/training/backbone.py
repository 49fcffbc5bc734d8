"""The frozen backbone: what a recipe asks for is checked first, then loaded."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from hycam.data.tokenization import check_tokenizer
from hycam.errors import InputError
from hycam.training.gguf import check_gguf, gguf_path, named_gguf
from hycam.training.known_backbones import without_hub
from hycam.training.quantization import check_quantization, quantization_config
from hycam.training.recipe import BackboneConfig
from hycam.training.scratch import train_scratch_backbone


def check_available(config: BackboneConfig) -> None:
    """Raise `InputError` where the recipe asks for a package or device that is missing."""
    if config.attn_implementation == "flash_attention_2":
        _check_kernels("backbone.attn_implementation", "flash_attn", "flash-attn")
    if config.liger:
        _check_kernels("backbone.liger", "liger_kernel", "liger")
    if config.quantization is not None:
        check_quantization(config.quantization)
    if config.is_gguf:
        check_gguf(config)
    elif config.name_or_path is not None and is_missing_path(config.name_or_path):
        raise InputError(f"backbone.name_or_path: {config.name_or_path}: no such folder, and no name of the hub's")
    if config.revision is not None and config.name_or_path is not None and Path(config.name_or_path).exists():
        kind = "folder" if Path(config.name_or_path).is_dir() else "file"
        raise InputError(
            f"backbone.revision: got {config.revision!r} for the {kind} {config.name_or_path}, which has no revisions"
        )


def is_missing_path(name: str) -> bool:
    """Whether a name can be that of a folder alone, which isn't there: hub names have one slash at most."""
    return (name.startswith(("/", ".")) or name.count("/") > 1) and not Path(name).is_dir()


def _check_kernels(field: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{field}: {package} is not installed, wanted: pip install 'hycam-kernels[{extra}]'")
    if not torch.accelerator.is_available():
        raise InputError(f"{field}: needs a GPU, none was found")


def backbone_name(config: BackboneConfig, run_folder: Path, seed: int) -> str:
    """The hub id or folder to load from; a backbone from scratch is trained here, once per settings and seed."""
    if config.scratch is not None:
        return str(train_scratch_backbone(config.scratch, run_folder, seed))
    assert config.name_or_path is not None
    return config.name_or_path


def load_backbone_config(config: BackboneConfig, name: str) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        InputError: an unknown model, one that is no causal language model, or one whose folder holds an adapter too,
            which would be loaded with it.
    """
    found = _load(AutoConfig, config, name)
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING and not config.trust_remote_code:
        raise InputError(
            f"backbone.name_or_path: {name}: a model of type {found.model_type}, wanted a causal language model"
        )
    if config.is_gguf:  # what an adapter's settings name as their backbone: the file, not its folder
        found._name_or_path = named_gguf(config, name)
    adapter = find_adapter_config_file(_source(config, name)[0], revision=config.revision or "main")
    if adapter is not None:
        raise InputError(
            f"backbone.name_or_path: {name} holds an adapter too ({Path(adapter).name}), which would be loaded under "
            "the run's own: wanted a folder without it"
        )
    return found


def backbone_commit(config: BackboneConfig, name: str) -> str | None:
    """The commit of the hub that a backbone whose configuration was just loaded comes from; None for a local one."""
    if Path(name).exists():
        return None
    file = try_to_load_from_cache(name, config.gguf_file or CONFIG_NAME, revision=config.revision or "main")
    return Path(file).parent.name if isinstance(file, str) else None


def check_max_length(config: PretrainedConfig, max_length: int, name: str) -> None:
    """Raise `InputError` where the backbone has fewer positions than `max_length`."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise InputError(f"data.max_length: {max_length} given, the backbone has {positions} positions ({name})")


def num_embeddings(config: PretrainedConfig) -> int:
    """How many tokens a model of this configuration has an embedding for."""
    return config.get_text_config().vocab_size


def check_ids(ids: Mapping[str, int], config: PretrainedConfig, name: str) -> None:
    """Raise `InputError` for a token that the backbone has no embedding for.

    Args:
        ids: what each is, for the message -> the id.
    """
    rows = num_embeddings(config)
    for where, number in ids.items():
        if number >= rows:
            raise InputError(f"{where} has id {number}, but {name} has embeddings for {rows} tokens (0 to {rows - 1})")


def load_tokenizer(config: BackboneConfig, name: str, *, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer, padding as the recipe says. Raises `InputError` where it has no eos or pad token.

    Args:
        local_files_only: ask no hub, whose answer a machine without it waits for.
    """
    tokenizer = _load(AutoTokenizer, config, name, local_files_only=local_files_only)
    if config.pad_token is not None:
        known = tokenizer.get_vocab()
        if config.pad_token not in known:
            raise InputError(f"backbone.pad_token: {config.pad_token!r} is no token of {name}, wanted one that is")
        tokenizer.pad_token = config.pad_token
    check_tokenizer(tokenizer)
    return tokenizer


def load_model(config: BackboneConfig, name: str) -> PreTrainedModel:
    """The causal language model, from safetensors or a GGUF file alone: on the CPU, or where quantised layers are made.

    Raises:
        InputError: files that can't be loaded, or that lack weights which the configuration asks for.
    """
    quantized: dict[str, Any] = {}
    if config.quantization is not None:
        quantized = {"quantization_config": quantization_config(config)}
    elif config.is_gguf:
        # a model in GGUF's blocks counts as quantised: it could neither be trained whole nor saved
        quantized = {"quantization_config": GgufConfig(dequantize=True)}
    model, report = _load(
        AutoModelForCausalLM,
        config,
        name,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        use_safetensors=True,
        output_loading_info=True,
        **quantized,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"backbone.name_or_path: {name}: {len(missing)} tensors of its config.json are not among its weights, the "
            f"first is {missing[0]}: they would be random"
        )
    if config.is_gguf:
        model.name_or_path = model.config._name_or_path = named_gguf(config, name)
    return model


def build_model(config: BackboneConfig, model_config: PretrainedConfig) -> PreTrainedModel:
    """The model without its weights, on the meta device.

    Flash attention is left to the model that runs: sdpa keeps what it keeps (queries, keys, values, outputs and their
    log-sum-exp).
    """
    attention = config.attn_implementation
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config,
            dtype=getattr(torch, config.dtype) if config.dtype != "auto" else model_config.dtype or torch.float32,
            attn_implementation="sdpa" if attention == "flash_attention_2" else attention,
            trust_remote_code=config.trust_remote_code,
        )
    return model


def _load(auto_class: Any, config: BackboneConfig, name: str, **options: Any) -> Any:
    source, gguf = _source(config, name)
    try:
        return auto_class.from_pretrained(
            source, revision=config.revision or "main", trust_remote_code=config.trust_remote_code, **gguf, **options
        )
    except Exception as error:  # transformers and the libraries below it have as many kinds as files can be broken
        # transformers explains itself over many lines: the first says what is wrong
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = without_hub(name)
        told = reason if hint is None else f"{reason}; {hint}"
        raise InputError(f"backbone.name_or_path: {name}: can't be loaded: {told}") from error


def _source(config: BackboneConfig, name: str) -> tuple[str, dict[str, str]]:
    """What transformers loads from, and the GGUF file in it where that is what a backbone lies in."""
    if not config.is_gguf:
        return name, {}
    file = gguf_path(config, name)
    return str(file.parent), {"gguf_file": str(file)}
