"""A study's recipe: the sections of a run's recipe, shared by every run, and which methods and backbones they train."""

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hycam.errors import InputError
from hycam.training.known_backbones import leave_other_backbone
from hycam.training.recipe import BackboneConfig, Recipe, backbone_section, parse_recipe
from hycam.training.recipe_files import find_yaml, packaged_yaml, parse_yaml, read_yaml, set_field
from hycam.training.schema import Reader
from hycam.training.scratch import ScratchConfig

STUDY_FILE = "study.yaml"

# The adapters that HyCAM is tested against, unless the study says otherwise: PEFT methods that are no variant of it.
_BASELINE_METHODS = ("lora", "multilora", "moelora", "riemoe")

# What a method may set for itself: nothing that reaches the rows, their order, the number of steps or what is measured.
# The dtype is there for `full`, whose weights need more bits than those of a frozen backbone.
_OWN_BACKBONE_FIELDS = ("dtype",)
_OWN_DATA_FIELDS = ("train_on_prompt",)
_OWN_TRAINER_FIELDS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "deepspeed",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "optim",
    "optim_args",
    "per_device_train_batch_size",
    "warmup_steps",
    "weight_decay",
)
_SHARED_SECTIONS = ("tasks", "data", "trainer", "early_stopping", "evaluation")
# Fields of a run that the study sets, and where its recipe has them instead.
_SET_BY_STUDY = {"data.fold": "folds", "trainer.learning_rate": "learning_rates"}

_NAME = re.compile(r"[\w.+-]+")


@dataclass
class StudyMethod:
    """One method: its `method` section, and what it has for itself.

    Attributes:
        section: the `method` section of its runs.
        learning_rates: its own grid; None: the study's.
        trainer, data, backbone: fields that differ from the study's sections.
    """

    section: dict[str, Any]
    learning_rates: list[float] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)


@dataclass
class Study:
    """Several methods on several backbones, over folds and seeds, under equal conditions.

    Attributes:
        backbones: name -> `backbone` section of a run's recipe.
        methods: name -> method, in the tables' order.
        tasks, data, trainer, early_stopping, evaluation: as in a run's recipe, for every run.
        output_dir: folder of the study.
        seeds, folds: every method runs once with each pair of them.
        learning_rates: the grid; a method takes the rate with the lowest loss on the first fold's validation rows that
            no fold tests, with the first seed.
        widen_rates: how many rates beyond a grid's edge are tried, one after another, while the best is the edge; each
            is as far from the edge as that from its neighbour, as a ratio.
        reference: the method that the baselines are tested against, and that ablations and sweeps vary.
        baselines: methods among which the best is tested; None: the PEFT methods that are no variant of HyCAM.
        families: title -> names of backbones whose results stand side by side in a table.
        keep: what stays of a finished run beside its numbers: `adapters`, also whole `models`, or `nothing`.
    """

    backbones: dict[str, dict[str, Any]]
    methods: dict[str, StudyMethod]
    tasks: list[Any]
    output_dir: str = "runs/study"
    seeds: list[int] = field(default_factory=lambda: [0])
    folds: list[int] = field(default_factory=lambda: [0])
    learning_rates: list[float] = field(default_factory=lambda: [2e-5])
    widen_rates: int = 0
    reference: str = "hycam"
    baselines: list[str] | None = None
    families: dict[str, list[str]] = field(default_factory=dict)
    keep: Literal["adapters", "models", "nothing"] = "adapters"
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    early_stopping: dict[str, Any] | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    source: str = field(default="study", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("backbones", "methods", "tasks", "seeds", "folds", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name}: none given, wanted at least one")
        for name in ("seeds", "folds"):
            _check_distinct(name, getattr(self, name))
        _check_rates("learning_rates", self.learning_rates)
        if self.widen_rates < 0:
            raise ValueError(f"widen_rates: got {self.widen_rates}, wanted 0 or more")
        for section in ("backbones", "methods"):
            for name in getattr(self, section):
                if not (isinstance(name, str) and _NAME.fullmatch(name)):
                    raise ValueError(f"{section}: {name!r}, wanted a name of letters, digits and . + - _ (a folder's)")
        references: list[tuple[str, list[str], dict[str, Any]]] = [
            ("reference", [self.reference], self.methods),
            ("baselines", self.baselines or [], self.methods),
            *((f"families.{title}", names, self.backbones) for title, names in self.families.items()),
        ]
        for name, chosen, known in references:
            for entry in chosen:
                if entry not in known:
                    raise ValueError(f"{name}: {entry!r}, wanted one of {', '.join(known)}")
        if self.reference in (self.baselines or []):
            raise ValueError(f"baselines: {self.reference!r} is the reference, wanted other methods")

    @property
    def output_path(self) -> Path:
        return Path(self.output_dir).expanduser()

    def rates(self, method: str) -> list[float]:
        """The learning rates that are tried for a method."""
        return self.methods[method].learning_rates or self.learning_rates

    def changes_backbone(self, method: str | None) -> bool:
        """Whether a method's runs have the backbone otherwise than the study does."""
        return method is not None and bool(self.methods[method].backbone)

    def candidates(self) -> list[str]:
        """The methods among which the best is tested against the reference."""
        if self.baselines is not None:
            return self.baselines
        return [name for name, method in self.methods.items() if method.section.get("name") in _BASELINE_METHODS]

    def recipe(
        self,
        backbone: str,
        method: str,
        *,
        fold: int,
        seed: int,
        learning_rate: float,
        folder: str,
        weights: str | None = None,
    ) -> Recipe:
        """The recipe of one run.

        Args:
            folder: of the run, inside the study's.
            weights: folder of the backbone's weights, which the study trained from scratch.

        Raises:
            InputError: a section that a run can't have; it names backbone, method and field.
        """
        own = self.methods[method]
        section = self.backbones[backbone]
        if weights is not None:
            section = {key: value for key, value in section.items() if key != "scratch"} | {"name_or_path": weights}
        values = {
            "seed": seed,
            "output_dir": str(Path(self.output_dir) / folder),
            "backbone": section | own.backbone,
            "method": own.section,
            "tasks": self.tasks,
            "data": self.data | own.data | {"fold": fold},
            "trainer": self.trainer | own.trainer | {"learning_rate": learning_rate},
            "early_stopping": self.early_stopping,
            "evaluation": self.evaluation,
        }
        return parse_recipe(copy.deepcopy(values), f"{self.source}: {backbone}, {method}")

    def scratch(self, backbone: str) -> ScratchConfig:
        """The settings of a backbone that the study trains from scratch."""
        config = Reader(self.source).build(BackboneConfig, self.backbones[backbone], f"backbones.{backbone}")
        assert config.scratch is not None
        return config.scratch

    def to_dict(self) -> dict[str, Any]:
        """Plain values: `load_study` of their YAML gives this study again."""
        values = dataclasses.asdict(self)
        del values["source"]
        values["methods"] = {name: _method_values(method) for name, method in self.methods.items()}
        return values


def _method_values(method: StudyMethod) -> dict[str, Any]:
    own = {name: getattr(method, name) for name in ("learning_rates", "trainer", "data", "backbone")}
    return method.section | {name: value for name, value in own.items() if value}


def packaged_studies() -> dict[str, Path]:
    """Name -> file of the studies that ship."""
    return packaged_yaml("recipes", "studies")


def load_study(name_or_path: str, overrides: Sequence[tuple[str, str]] = ()) -> Study:
    """Read a study: a YAML file, a study's folder, or the bare name of one that ships.

    Args:
        name_or_path: where it is.
        overrides: dotted field and YAML text of its value, as `("methods.lora.r", "8")`.

    Raises:
        InputError: one line that names the file (or option) and the field.
    """
    path = find_yaml(name_or_path, STUDY_FILE, packaged_studies())
    study = parse_study(read_yaml(path), str(path), overrides)
    if Path(name_or_path).expanduser().is_dir() and "output_dir" not in dict(overrides):
        study.output_dir = name_or_path  # the study may have been moved since
    return study


def parse_study(values: Any, source: str, overrides: Sequence[tuple[str, str]] = ()) -> Study:
    """A `Study` from plain values, every one of its runs' recipes checked; `source` names them in messages."""
    reader = Reader(source, frozenset(name for name, _ in overrides))
    if not isinstance(values, dict):
        reader.fail("", f"got {type(values).__name__}, wanted a mapping of the study's sections")
    _name_backbones(reader, values)
    given = {name for name, _ in overrides}
    for name, text in overrides:
        _check_named(values, name)
        value = parse_yaml(text, f"--{name}")
        section, _, field = name.rpartition(".")
        if section.startswith("backbones.") and isinstance(values.get("backbones"), dict):
            of_backbone = values["backbones"].get(section.removeprefix("backbones."))
            leave_other_backbone(of_backbone, section, field, value, given)
        set_field(values, name, value)
    _name_backbones(reader, values)
    sections = reader.mapping(values, "", [item.name for item in dataclasses.fields(Study) if item.init])
    for name in _SET_BY_STUDY:
        section, _, key = name.partition(".")
        if isinstance(sections.get(section), Mapping) and key in sections[section]:
            reader.fail(name, f"set `{_SET_BY_STUDY[name]}` of the study")
    if isinstance(sections.get("methods"), Mapping):
        sections["methods"] = {name: _grouped(entry) for name, entry in sections["methods"].items()}
    study: Study = reader.build(Study, sections)
    study.source = source
    for name, method in study.methods.items():
        _check_own_fields(reader, study, name, method)
    for recipe in _recipes(study):
        if recipe.trainer.get("save_only_model"):
            reader.fail("trainer.save_only_model", "got true, wanted false: a study's runs go on where they stopped")
        if recipe.trainer.get("eval_strategy") == "no" and any(len(study.rates(name)) > 1 for name in study.methods):
            reader.fail("trainer.eval_strategy", "got no, wanted steps or epoch: the rates are chosen by validation")
    return study


def _name_backbones(reader: Reader, values: dict[str, Any]) -> None:
    """Put the sections of backbones that ship in the place of their names."""
    if isinstance(values.get("backbones"), Mapping):
        values["backbones"] = {
            name: backbone_section(reader, entry, f"backbones.{name}") for name, entry in values["backbones"].items()
        }


def _check_named(values: Mapping[str, Any], override: str) -> None:
    """Refuse a field of a method or backbone that the study doesn't have: a wrong name would add another."""
    section, _, name = override.partition(".")
    if section not in ("backbones", "methods") or not isinstance(values.get(section), Mapping) or not name:
        return
    if not any(f"{name}.".startswith(f"{known}.") for known in values[section]):
        raise InputError(f"--{override}: none of the study's {section}, wanted one of {', '.join(values[section])}")


def _grouped(entry: Any) -> Any:
    """A method's entry with the fields of its `method` section apart from its own."""
    if not isinstance(entry, Mapping):
        return entry
    own = [item.name for item in dataclasses.fields(StudyMethod) if item.name != "section"]
    section = {name: value for name, value in entry.items() if name not in own}
    return {"section": section} | {name: entry[name] for name in own if name in entry}


def _check_own_fields(reader: Reader, study: Study, name: str, method: StudyMethod) -> None:
    """Refuse what would give one method other tokens, another start, order or number of steps than the rest."""
    if "init_from" in method.section:
        reader.fail(f"methods.{name}.init_from", "every run of a study starts anew: wanted none")
    own = {"trainer": _OWN_TRAINER_FIELDS, "data": _OWN_DATA_FIELDS, "backbone": _OWN_BACKBONE_FIELDS}
    for section, known in own.items():
        for key in getattr(method, section):
            if key not in known:
                wanted = f"one of {', '.join(known)}; the rest is every method's"
                reader.fail(f"methods.{name}.{section}.{key}", f"can't differ from the other methods', wanted {wanted}")
    rows, shared = _rows_of_step(study.trainer | method.trainer), _rows_of_step(study.trainer)
    if rows != shared:
        reader.fail(f"methods.{name}.trainer", f"a step of {rows} rows, wanted {shared} as the other methods have")
    rates = method.learning_rates
    if rates is not None:
        if not rates:
            reader.fail(f"methods.{name}.learning_rates", "none given, wanted at least one")
        try:
            _check_rates("learning_rates", rates)
        except ValueError as error:
            reader.fail(f"methods.{name}", str(error))


def _rows_of_step(trainer: Mapping[str, Any]) -> int:
    """Rows in an optimizer step of one process, by transformers' defaults where they aren't given."""
    return trainer.get("per_device_train_batch_size", 8) * trainer.get("gradient_accumulation_steps", 1)


def _check_distinct(name: str, values: Sequence[float]) -> None:
    if len({f"{value:g}" for value in values}) < len(values):
        raise ValueError(f"{name}: got {values}, wanted each once")


def _check_rates(name: str, rates: Sequence[float]) -> None:
    _check_distinct(name, rates)
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"{name}: got {rates}, wanted finite numbers above 0")


def _recipes(study: Study) -> Iterator[Recipe]:
    """Recipes in which every value of the study stands at least once."""
    combinations = [
        *itertools.product(study.backbones, study.methods, study.folds[:1], study.seeds[:1]),
        *itertools.product([*study.backbones][:1], [*study.methods][:1], study.folds, study.seeds),
    ]
    for backbone, method, fold, seed in combinations:
        rate = study.rates(method)[0]
        yield study.recipe(backbone, method, fold=fold, seed=seed, learning_rate=rate, folder=".")
