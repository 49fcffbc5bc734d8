"""The settings of a HyCAM adapter."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from hycam.adapter.peft_type import ForeignPeftType
from hycam.adapter.saved_config import SavedConfig
from hycam.errors import InputError

HYCAM = ForeignPeftType("HYCAM")

CamForm = Literal["full", "slora", "none"]
ExpertForm = Literal["slora", "full", "none"]
Routing = Literal["soft", "hard"]
Noise = Literal["train", "always", "never"]
BalanceScope = Literal["layer", "model"]
Modulation = Literal["attention", "residual"]
Backend = Literal["auto", "torch", "triton"]

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released_code": {
        "modulation": "residual",
        "routing": "hard",
        "noise": "always",
        "train_router": False,
        "lora_alpha": 32.0,
        "bias": True,
        "train_norms": True,
        "balance_coef": 0.0,
    },
    "shared_only": {"experts": "none"},
    "full_spec": {"experts": "full"},
    "spec_only": {"shared": "none"},
    "inverse_peft": {"shared": "slora", "experts": "full"},
}

_CHOICES = {
    "balance_scope": BalanceScope,
    "shared": CamForm,
    "experts": ExpertForm,
    "routing": Routing,
    "noise": Noise,
    "modulation": Modulation,
    "backend": Backend,
}
# What PEFT's configurations have for LoRA, and tools read or set, but HyCAM gives no meaning.
_REFUSED = {
    "target_parameters": "it modulates what attention modules return, no parameters",
    "rank_pattern": "every layer has rank r",
    "alpha_pattern": "every layer has the scale lora_alpha / r",
    "ensure_weight_tying": "trained copies of tied modules are trained and saved apart",
}
_FLAGS = ("train_router", "bias", "train_norms", "recompute", "fuse_norm")


@dataclass
class HyCAMConfig(SavedConfig):
    """Settings of a HyCAM adapter; the defaults are the paper's.

    Args:
        r: rank of the SLoRA factors.
        num_experts: number E of specialised CAMs.
        tau: temperature of the router's softmax, above 0.
        balance_coef: lambda, the weight of the balance loss; 0 leaves it out.
        balance_scope: "layer" averages the layers' balance losses; "model" takes one loss of the routing weights
            pooled over all layers' tokens.
        shared: the shared CAM: a full d x d matrix, low-rank SLoRA factors, or none.
        experts: the specialised CAMs: SLoRA factors, full d x d matrices, or none.
        routing: "soft" weights every expert; "hard" takes the best one, with a straight-through gradient.
        noise: when Gumbel noise joins the routing logits: in training, always, or never.
        train_router: whether the router is trained or stays at its random start.
        bias: whether the projections have biases (zero at the start).
        lora_alpha: an expert's product is scaled by ``lora_alpha / r`` inside its SiLU; None: no scale.
        modulation: what is modulated: the attention's output, or the residual stream after it (known architectures
            whose residual addition is plain).
        train_norms: also train the norms before attention and MLP; they are saved with the adapter.
        recompute: keep no intermediate products for the backward pass.
        fuse_norm: in training, run the norm before the attention as `hycam_kernels.norm_project`, which makes the
            experts' projections and the router's logits in the same pass (known architectures; low-rank experts without
            biases). It changes no parameter and no name: an adapter trained with it runs without it, and the reverse.
        layers_to_transform: the decoder layers, by index, that get the adapter; None: all.
        layers_pattern: with `layers_to_transform`, name of the list of layers that the indices are about (a regular
            expression or a list of them), where a model has several; None: any.
        target_modules: names of the attention modules (a suffix, a list of suffixes, or one regular expression that
            matches whole names); None: every self-attention of the decoder, as `docs/architectures.md` says.
        exclude_modules: names of modules that get no adapter though they are targets (a suffix, a list of suffixes, or
            one regular expression that matches whole names).
        backend: the op's backend.
        modules_to_save: other modules to train and to save with the adapter.
        trainable_token_indices: ids of tokens whose embeddings are trained and saved with the adapter: a list for the
            input embedding, or lists by the embeddings' names.
        target_parameters: refused; there for tools that read it, as the next three.
        rank_pattern: refused.
        alpha_pattern: refused.
        ensure_weight_tying: refused.

    Raises:
        InputError: (a ValueError) for a value that can't be used; it names the field.
    """

    r: int = 64
    num_experts: int = 5
    tau: float = 0.5
    balance_coef: float = 0.1
    balance_scope: BalanceScope = "layer"
    shared: CamForm = "full"
    experts: ExpertForm = "slora"
    routing: Routing = "soft"
    noise: Noise = "train"
    train_router: bool = True
    bias: bool = False
    lora_alpha: float | None = None
    modulation: Modulation = "attention"
    train_norms: bool = False
    recompute: bool = False
    fuse_norm: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    backend: Backend = "auto"
    modules_to_save: list[str] | None = field(default=None)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: None = None
    rank_pattern: None = None
    alpha_pattern: None = None
    ensure_weight_tying: bool = False

    method_name: ClassVar[str] = "HyCAM"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HYCAM
        self.check()
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "HyCAMConfig":
        """The settings called `name`, changed by `overrides`.

        "paper", "released_code" (where the authors' code differs from the paper), and the ablations "shared_only",
        "full_spec", "spec_only" and "inverse_peft".
        """
        if name not in _PRESETS:
            raise InputError(f"preset: got {name!r}, want one of {', '.join(_PRESETS)}")
        return cls(**(_PRESETS[name] | overrides))

    @property
    def scale(self) -> float:
        """The factor inside the experts' SiLU."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.r

    def check(self) -> None:
        """Refuse values that can't be used. Raises `InputError`."""
        for name, reason in _REFUSED.items():
            if getattr(self, name):
                raise InputError(f"{name}: got {getattr(self, name)!r}, want none: {reason}")
        for name, literal in _CHOICES.items():
            if getattr(self, name) not in get_args(literal):
                raise InputError(f"{name}: got {getattr(self, name)!r}, want one of {', '.join(get_args(literal))}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: got {getattr(self, name)!r}, want true or false")
        for name in ("r", "num_experts"):
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)!r}, want an integer of at least 1")
        if not is_finite(self.tau) or self.tau <= 0:
            raise InputError(f"tau: got {self.tau!r}, want a finite number above 0")
        if not is_finite(self.balance_coef) or self.balance_coef < 0:
            raise InputError(f"balance_coef: got {self.balance_coef!r}, want a finite number of at least 0")
        if self.lora_alpha is not None and (not is_finite(self.lora_alpha) or self.lora_alpha <= 0):
            raise InputError(f"lora_alpha: got {self.lora_alpha!r}, want a finite number above 0, or none for no scale")
        if self.shared == "none" and self.experts == "none":
            raise InputError("experts: got 'none' together with shared='none', want at least one of the two")
        if self.fuse_norm and self.experts != "slora":
            raise InputError(
                f"fuse_norm: got True with experts={self.experts!r}, want False, or experts='slora', whose low-rank "
                "projections the norm's pass makes"
            )
        if self.fuse_norm and self.bias:
            raise InputError("fuse_norm: got True with bias=True, want False, or bias=False: its projections have none")
        check_targets(self.target_modules, self.layers_to_transform)
        if self.exclude_modules is not None:
            _check_names("exclude_modules", self.exclude_modules)
        if self.layers_pattern is not None:
            _check_names("layers_pattern", self.layers_pattern)
            if self.layers_to_transform is None:
                raise InputError(
                    f"layers_pattern: got {self.layers_pattern!r} without layers_to_transform, want both or neither"
                )
        check_tokens(self.trainable_token_indices)


def check_targets(targets: Any, layers: Any) -> None:
    """Refuse `target_modules` and `layers_to_transform` that PEFT would take wrongly. Raises `InputError`."""
    if targets is not None:
        _check_names("target_modules", targets)
    if layers is not None:
        indices = layers if isinstance(layers, list | tuple) else [layers]
        if not indices or not all(is_int(index) and index >= 0 for index in indices):
            raise InputError(
                f"layers_to_transform: got {layers!r}, want an index of at least 0 or a non-empty list of them"
            )
        if isinstance(targets, str):
            raise InputError(
                f"layers_to_transform: got {layers!r} with target_modules={targets!r}, want a list of names in "
                "target_modules, or the layers in its regular expression"
            )


def _check_names(field_name: str, given: Any) -> None:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple | set) or not names or not all(isinstance(n, str) and n for n in names):
        raise InputError(f"{field_name}: got {given!r}, want a module name or a non-empty list of them")


def check_tokens(given: Any) -> None:
    """Refuse `trainable_token_indices` that PEFT would take wrongly. Raises `InputError`."""
    lists = list(given.values()) if isinstance(given, dict) else [] if given is None else [given]
    for ids in lists:
        if not isinstance(ids, list | tuple) or not ids or not all(is_int(token) and token >= 0 for token in ids):
            raise InputError(
                f"trainable_token_indices: got {given!r}, want a list of token ids, or such lists by embeddings' names"
            )


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
