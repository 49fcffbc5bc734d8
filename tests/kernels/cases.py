"""Inputs of the op for a test case, and the comparison of a result with the float64 truth."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hycam_kernels.reference import modulation_reference

WEIGHTS = ("shared_weight", "lora_a", "lora_n", "lora_b", "router_weight")
BIASES = ("shared_bias", "lora_a_bias", "lora_n_bias", "lora_b_bias", "router_bias")


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call. ``leading`` are the token dimensions.

    ``experts`` are "slora", "full", "projected" (V and the logits are given) or None.
    """

    leading: tuple[int, ...] = (2, 13)
    d: int = 24
    num_experts: int = 3
    rank: int = 4
    shared: bool = True
    experts: str | None = "slora"
    biases: bool = False
    residual: bool = False
    masked: bool = False
    options: dict = field(default_factory=dict)

    def make(self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None, seed: int = 0) -> dict:
        """Random arguments of `hycam_modulation` by name (`projections` as v and logits), floats requiring grad."""
        generator = torch.Generator().manual_seed(seed)
        weight_dtype = weight_dtype or dtype
        E, r, d = self.num_experts, self.rank, self.d

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return values.to(dtype).requires_grad_()

        def weight(*shape: int) -> Tensor:
            return draw(*shape, scale=shape[-1] ** -0.5, dtype=weight_dtype)

        arguments = dict.fromkeys((*WEIGHTS, *BIASES, "expert_weight", "residual", "gumbel", "token_mask"))
        arguments["hidden"] = draw(*self.leading, d)
        arguments["attn_output"] = draw(*self.leading, d)
        if self.shared:
            arguments["shared_weight"] = weight(d, d)
        if self.experts in ("slora", "full"):
            arguments["router_weight"] = weight(E, d)
        if self.experts == "slora":
            arguments |= {"lora_a": weight(E, r, d), "lora_n": weight(E, r, r), "lora_b": weight(E, d, r)}
        elif self.experts == "full":
            arguments["expert_weight"] = weight(E, d, d)
        elif self.experts == "projected":
            arguments |= {"v": draw(*self.leading, E, r), "logits": draw(*self.leading, E), "lora_b": weight(E, d, r)}
        if self.biases:
            shapes = {"lora_b_bias": (E, d)} if self.experts else {}
            if self.experts in ("slora", "full"):
                shapes["router_bias"] = (E,)
            if self.experts == "slora":
                shapes |= {"lora_a_bias": (E, r), "lora_n_bias": (E, r)}
            if self.shared:
                shapes["shared_bias"] = (d,)
            arguments |= {name: draw(*shape, scale=0.5, dtype=weight_dtype) for name, shape in shapes.items()}
        if self.residual:
            arguments["residual"] = draw(*self.leading, d)
        if self.masked:
            arguments["token_mask"] = torch.rand(self.leading, generator=generator) > 0.3
        return arguments | self.options


def leaves(arguments: dict) -> dict[str, Tensor]:
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}


def packed(arguments: dict) -> dict:
    """The arguments with "v" and "logits", where they are, as `projections`."""
    rest = {name: value for name, value in arguments.items() if name not in ("v", "logits")}
    return rest | {"projections": (arguments["v"], arguments["logits"])} if "v" in arguments else rest


def run(function, arguments: dict, **options) -> dict[str, Tensor]:
    """Outputs and every gradient of a fixed scalar of all outputs."""
    output = function(**packed(arguments), **options)
    out = output.hidden_states
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    load_weight = torch.linspace(-1, 1, output.load.numel(), dtype=output.load.dtype)
    scalar = (out * upstream).sum() + 3 * output.balance_loss + (output.load * load_weight).sum()
    names = leaves(arguments)
    grads = torch.autograd.grad(scalar, list(names.values()), allow_unused=True)
    results = dict(zip(output._fields, output, strict=True))
    results |= {
        f"grad_{name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(names.items(), grads, strict=True)
    }
    return {name: value.detach() for name, value in results.items()}


def kept_bytes(op, arguments: dict, **options) -> int:
    """Bytes that autograd keeps after the op's forward beside the storages of its arguments."""
    given = {value.untyped_storage().data_ptr() for value in arguments.values() if isinstance(value, Tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        op(**arguments, **options)
    return sum(kept.values())


def reference_results(arguments: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results of the reference with every float tensor cast to ``dtype``."""
    return run(modulation_reference, cast_floats(arguments, dtype))


def cast_floats(arguments: dict, dtype: torch.dtype) -> dict:
    """The arguments with every float tensor as a leaf of ``dtype``."""
    return {
        name: value.detach().to(dtype).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """For each result the relative error of the whole and the largest error of a row, relative to the typical row."""
    found = {}
    for name, expected in truth.items():
        assert results[name].shape == expected.shape, name
        if expected.numel() == 0:
            continue
        got = results[name].double().reshape(-1, expected.shape[-1] if expected.ndim else 1)
        want = expected.double().reshape(got.shape)
        size = want.norm().clamp_min(1e-30)
        rows = (got - want).norm(dim=-1) * want.shape[0] ** 0.5 / size
        found[name] = (((got - want).norm() / size).item(), rows.max().item())
    return found


def assert_as_good_as_eager(
    function, case, dtype: torch.dtype, weight_dtype=None, draws: int = 4, reference=reference_results, times: float = 2
) -> None:
    """Every error against float64 is at most ``times`` what the reference run eagerly in ``dtype`` makes.

    The results of ``draws`` inputs, and of 16 tokens at least, are compared as one: a single small one can be exact by
    luck, or so near to zero that its relative error says nothing. Eager's errors are those of 64 tokens at least: its
    largest error of a row differs fivefold between one sixteen of tokens and the next, where p's gradient cancels. A
    few roundings of the result's own dtype are granted.
    """
    tokens = max(math.prod(case.leading), 1)
    draws = max(draws, -(-16 // tokens))
    truths, eagers, results = [], [], []
    for seed in range(max(draws, -(-64 // tokens))):
        arguments = case.make(dtype, weight_dtype, seed)
        truths.append(reference(arguments, torch.float64))
        eagers.append(reference(arguments, dtype))
        if seed < draws:
            results.append(function(arguments))
    found = errors(_stacked(results), _stacked(truths[:draws]))
    of_eager = errors(_stacked(eagers), _stacked(truths))
    assert found
    for name, (whole, row) in found.items():
        eager_whole, eager_row = of_eager[name]
        # a scalar is a sum whose own roundings eager may not make
        rounding = torch.finfo(results[0][name].dtype).eps * (1 if truths[0][name].ndim else 4)
        assert whole <= times * eager_whole + rounding, (name, whole, eager_whole)
        assert row <= times * eager_row + 4 * rounding, (name, row, eager_row)


def _stacked(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([results[name] for results in draws]) for name in draws[0]}
