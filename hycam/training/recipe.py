"""Recipes: one YAML file, with overrides from the command line, read strictly into a tree of dataclasses."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from hycam.data.config import DataConfig, TaskConfig
from hycam.errors import InputError
from hycam.training.engines import check_checkpointing, deepspeed_settings, fsdp_backend, join_processes
from hycam.training.known_backbones import leave_other_backbone, machine_dtype, named_section, packaged_backbones
from hycam.training.method import MethodConfig, method_fields, method_section
from hycam.training.recipe_files import find_yaml, packaged_yaml, parse_yaml, read_yaml, set_field
from hycam.training.schema import Reader, suggest
from hycam.training.scratch import ScratchConfig

# TrainingArguments that the run sets itself, and where the user sets them instead.
RESERVED_TRAINER_FIELDS = {
    "output_dir": "set `output_dir` at the top of the recipe",
    "seed": "set `seed` at the top of the recipe",
    "resume_from_checkpoint": "use `hycam train --resume`",
    "use_liger_kernel": "set `backbone.liger`",
    "per_device_eval_batch_size": "set `evaluation.batch_size`",
    "enable_jit_checkpoint": "SIGTERM and SIGINT always save first",
    "logging_nan_inf_filter": "a loss that is not finite always stops the run",
    "remove_unused_columns": "the collator chooses the columns",
    "save_on_each_node": "output_dir must lie where every node sees it",
    "restore_callback_states_from_checkpoint": "`hycam train --resume` always restores them",
}

GGUF_SUFFIX = ".gguf"

# What a recipe's `trainer` section starts from, where that differs from transformers' defaults.
TRAINER_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": False,  # transformers would guess otherwise for a perplexity
    "report_to": ["tensorboard"],
}


@dataclass
class BackboneConfig:
    """The frozen model: one of the hub or a folder, or one that the run first trains from scratch.

    Attributes:
        name_or_path: hub id, folder or GGUF file; exactly one of this and `scratch` is given.
        scratch: a small Llama trained on general text before it is adapted.
        gguf_file: the GGUF file in that folder or hub repository; its weights, quantised or not, are read into `dtype`.
        revision: branch, tag or commit on the hub.
        dtype: of the frozen weights; `auto` is the checkpoint's own. A GGUF file's blocks have none: a recipe takes
            bfloat16 where the machine multiplies it in hardware, else float32, as it always does for `full`.
        attn_implementation: None leaves transformers' choice for the architecture.
        liger: Liger's Triton kernels in the backbone's own layers.
        trust_remote_code: run code that the hub's repository brings.
        pad_token: an existing token that pads, for a tokenizer that names none.
        quantization: what the frozen linear layers are quantised to on loading, by bitsandbytes or torchao; the rest
            keeps `dtype`, and so does what they compute in.
    """

    name_or_path: str | None = None
    scratch: ScratchConfig | None = None
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    liger: bool = False
    trust_remote_code: bool = False
    pad_token: str | None = None
    quantization: Literal["bnb-8bit", "bnb-4bit", "torchao-int8", "torchao-float8"] | None = None

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.scratch is None):
            given = "neither" if self.scratch is None else "both"
            raise ValueError(f"got {given} of name_or_path and scratch, wanted one (set the other to null)")
        if self.name_or_path is not None and self.name_or_path.startswith("~"):
            self.name_or_path = str(Path(self.name_or_path).expanduser())
        if not self.is_gguf:
            return
        if self.name_or_path is None:
            raise ValueError(f"gguf_file: got {self.gguf_file!r} with scratch, wanted it with name_or_path")
        if self.gguf_file is not None and Path(self.name_or_path).suffix == GGUF_SUFFIX:
            raise ValueError(
                f"gguf_file: got {self.gguf_file!r} beside the file {self.name_or_path}, wanted one of them"
            )
        if self.quantization is not None:
            raise ValueError(
                f"quantization: got {self.quantization!r}, wanted null for a GGUF file: its weights become dtype"
            )

    @property
    def is_gguf(self) -> bool:
        """Whether the weights, the configuration and the tokenizer lie in one GGUF file."""
        return self.gguf_file is not None or Path(self.name_or_path or "").suffix == GGUF_SUFFIX


@dataclass
class EarlyStoppingConfig:
    """Stop after `patience` evaluations in a row whose overall validation loss is not better by `threshold`."""

    patience: int = 3
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience: got {self.patience}, wanted at least 1")
        if self.threshold < 0:
            raise ValueError(f"threshold: got {self.threshold}, wanted at least 0")


@dataclass
class EvaluationConfig:
    """How validation and test splits are evaluated.

    Attributes:
        batch_size: rows in a forward pass, and in a generation.
        generation: also BLEU-4 and ROUGE-L of greedy responses on the test split.
        max_new_tokens: longest response.
        max_generation_rows: rows of each task that are generated, None for all.
        max_validation_rows: rows of each task that a validation during training measures, evenly spaced over its
            validation split; None for all.
    """

    batch_size: int = 8
    generation: bool = False
    max_new_tokens: int = 256
    max_generation_rows: int | None = None
    max_validation_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "max_generation_rows", "max_validation_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, wanted at least 1")


@dataclass
class Recipe:
    """One run, whole: every section of the YAML file, and `source`, the file itself, for messages."""

    backbone: BackboneConfig
    tasks: list[TaskConfig] = field(default_factory=list)
    output_dir: str = "runs/hycam"
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    early_stopping: EarlyStoppingConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    source: str = field(default="recipe", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, wanted 0 to {2**32 - 1}")
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tasks: two are named {name!r}")
            if name == "overall":
                raise ValueError("tasks: got the name 'overall', wanted another: it is that of all tasks' numbers")

    @property
    def output_path(self) -> Path:
        return Path(self.output_dir).expanduser()

    def to_dict(self) -> dict[str, Any]:
        """Plain values: `load_recipe` of their YAML gives this recipe again."""
        values = dataclasses.asdict(self)
        del values["source"]
        values["method"] = self.method.to_dict()
        return values

    def training_arguments(self) -> TrainingArguments:
        """The HF Trainer's arguments. Raises `InputError` where they contradict each other or this machine."""
        values = TRAINER_DEFAULTS | {"use_cpu": not _has_gpu()} | _saves_at_validations(self.trainer) | self.trainer
        values["deepspeed"] = deepspeed_settings(values.get("deepspeed"))
        values.setdefault("ddp_backend", fsdp_backend(values))
        join_processes(values)
        try:
            arguments = TrainingArguments(
                **values,
                output_dir=str(self.output_path),
                seed=self.seed,
                per_device_eval_batch_size=self.evaluation.batch_size,
                use_liger_kernel=self.backbone.liger,
                logging_nan_inf_filter=False,
                remove_unused_columns=False,
                restore_callback_states_from_checkpoint=True,
            )
        except Exception as error:  # transformers checks the fields, and so do the libraries that they name
            raise InputError(f"{self.source}: trainer: {' '.join(str(error).split())}") from error
        if arguments.device.type == "mps":
            raise InputError(f"{self.source}: trainer.use_cpu: got false, wanted true: an Apple GPU has no float64")
        check_checkpointing(arguments)
        if arguments.gradient_checkpointing and arguments.ddp_find_unused_parameters is None:
            # what transformers sets for a model without PEFT: DDP's search breaks reentrant checkpointing
            arguments.ddp_find_unused_parameters = False
        installed = get_available_reporting_integrations()
        for name in arguments.report_to or []:
            if name not in installed:
                raise InputError(
                    f"{self.source}: trainer.report_to: got {name!r}, wanted one of those installed: "
                    f"{', '.join(installed) or 'none is'}"
                )
        return arguments


def _saves_at_validations(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What follows for checkpoints from a recipe's validations: each gets one, from which the best is chosen."""
    strategy = trainer.get("eval_strategy", TRAINER_DEFAULTS["eval_strategy"])
    if strategy == "no":
        return {"load_best_model_at_end": False}
    if strategy != "steps":
        return {}
    steps = trainer.get("eval_steps") or trainer.get("logging_steps", TRAINER_DEFAULTS["logging_steps"])
    return {"save_strategy": "steps", "save_steps": steps}


def _has_gpu() -> bool:
    """Whether there is an accelerator that has float64, which sums of losses and loads are made in."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is not None and accelerator.type != "mps"


def packaged_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that ship."""
    return packaged_yaml("recipes")


def load_recipe(name_or_path: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe: a YAML file, a run's folder, or the bare name of one that ships.

    Args:
        name_or_path: where the recipe is.
        overrides: dotted field and YAML text of its value, as `("trainer.learning_rate", "1e-4")`.

    Raises:
        InputError: one line that names the file (or option) and the field.
    """
    path = find_recipe(name_or_path)
    recipe = parse_recipe(read_yaml(path), str(path), overrides)
    if Path(name_or_path).expanduser().is_dir() and "output_dir" not in dict(overrides):
        recipe.output_dir = name_or_path  # the run may have been moved since
    return recipe


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe."""
    return find_yaml(name_or_path, "recipe.yaml", packaged_recipes())


def parse_recipe(values: Any, source: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """A `Recipe` from plain values; `source` names them in messages."""
    if not isinstance(values, dict):
        raise InputError(f"{source}: got {type(values).__name__}, wanted a mapping of the recipe's sections")
    _drop_other_method(values, overrides)
    reader = Reader(source, frozenset(name for name, _ in overrides))
    whole = _method_name(values, overrides) == "full"
    if "backbone" in values:
        values["backbone"] = backbone_section(reader, values["backbone"], "backbone", whole=whole)
    given = {name for name, _ in overrides}
    for name, text in overrides:
        value = parse_yaml(text, f"--{name}")
        if name.startswith("backbone."):
            leave_other_backbone(values.get("backbone"), "backbone", name.removeprefix("backbone."), value, given)
        set_field(values, name, backbone_section(reader, value, name, whole=whole) if name == "backbone" else value)
    known = [item.name for item in dataclasses.fields(Recipe) if item.init]
    sections = reader.mapping(values, "", known)
    if "method" in sections:
        sections["method"] = method_section(reader, sections["method"])
    if "trainer" in sections:
        sections["trainer"] = _trainer_section(reader, sections["trainer"] or {})
    recipe: Recipe = reader.build(Recipe, sections)
    recipe.source = source
    if recipe.backbone.is_gguf and recipe.backbone.dtype == "auto":
        recipe.backbone.dtype = machine_dtype(whole=recipe.method.name == "full")
    try:
        recipe.method.adapter_config()
    except (ValueError, TypeError) as error:
        reader.refuse("method", error, method_fields(recipe.method.name))
    return recipe


def backbone_section(reader: Reader, value: Any, path: str, *, whole: bool = False) -> Any:
    """`value`, or the section of the backbone that ships by the name `value`; `whole`: it is trained itself."""
    if not isinstance(value, str):
        return value
    known = packaged_backbones()
    if value not in known:
        reader.fail(path, f"got {value!r}, wanted fields, or a name that ships{suggest(value, known)}")
    return named_section(value, whole=whole)


def _method_name(values: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> Any:
    """What the recipe, with what the command line says of it, trains."""
    section = values.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    for option, text in overrides:
        if option == "method.name":
            name = parse_yaml(text, f"--{option}")
        elif option == "method":
            replaced = parse_yaml(text, f"--{option}")
            name = replaced.get("name") if isinstance(replaced, dict) else None
    return name


def _drop_other_method(values: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> None:
    """Empty the `method` section of `values` where the overrides name another method: its fields are not that one's."""
    given, section = dict(overrides), values.get("method")
    if "method.name" in given and "method" not in given and isinstance(section, dict):
        name = parse_yaml(given["method.name"], "--method.name")
        if name != section.get("name", "hycam"):
            values["method"] = {}


def _trainer_section(reader: Reader, value: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(TrainingArguments)
    items = [item for item in dataclasses.fields(TrainingArguments) if item.init]
    known = {item.name: hints[item.name] for item in items}
    choices = {item.name: list(item.metadata["choices"]) for item in items if "choices" in item.metadata}
    for name, instead in RESERVED_TRAINER_FIELDS.items():
        if isinstance(value, Mapping) and name in value:
            reader.fail(f"trainer.{name}", instead)
        known.pop(name, None)
    known["fsdp"] = bool | None  # transformers takes a string of FSDP1's options too
    values = reader.fields(value, known, "trainer")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if values.get(name, 1) < 1:
            reader.fail(f"trainer.{name}", f"got {values[name]}, wanted at least 1")
    for name, entry in values.items():
        # transformers doesn't look: a sampling strategy that it doesn't know is the random one
        if entry is not None and entry not in choices.get(name, [entry]):
            reader.fail(f"trainer.{name}", f"got {entry!r}, wanted {' | '.join(choices[name])}")
        # transformers has a number below 0 for what is not set, and none of its settings is one
        is_number = isinstance(entry, int | float) and not isinstance(entry, bool)
        if is_number and entry < 0 and entry != getattr(TrainingArguments, name, None):
            reader.fail(f"trainer.{name}", f"got {entry}, wanted at least 0")
    if not values.get("label_smoothing_factor", 0.0) < 1:
        reader.fail("trainer.label_smoothing_factor", f"got {values['label_smoothing_factor']}, wanted below 1")
    return values
