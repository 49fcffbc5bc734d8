"""Every error of the contract names the argument, what was given and what is wanted."""

import subprocess
import sys

import pytest
import torch

from hycam_kernels import hycam_modulation
from tests.kernels.cases import Case

D, E, R = 8, 3, 2


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# V and the logits in place of what makes them
PROJECTED = dict.fromkeys(("lora_a", "lora_n", "router_weight")) | {"projections": (zeros(4, E, R), zeros(4, E))}

BAD_VALUES = {
    "v-shape": (
        PROJECTED | {"projections": (zeros(4, R, E), zeros(4, E))},
        "projections[0] must have shape (4, 3, 2)",
        "(4, 2, 3)",
    ),
    "logits-shape": (
        PROJECTED | {"projections": (zeros(4, E, R), zeros(E))},
        "projections[1] must have shape (4, 3)",
        "(3,)",
    ),
    "projected-lora_b": (PROJECTED | {"lora_b": zeros(D, R)}, "lora_b must be [E, d, r]", "(8, 2)"),
    "projected-without-lora_b": (
        PROJECTED | {"lora_b": None},
        "projections[0], projections[1] without lora_b",
        "together",
    ),
    "projected-and-lora_n": (PROJECTED | {"lora_n": zeros(E, R, R)}, "lora_n must be None", "projections hold"),
    "projected-and-router": (
        PROJECTED | {"router_weight": zeros(E, D)},
        "router_weight must be None",
        "projections hold",
    ),
    "projected-and-lora_a_bias": (
        PROJECTED | {"lora_a_bias": zeros(E, R)},
        "lora_a_bias must be None",
        "projections hold",
    ),
    "projected-and-lora_n_bias": (
        PROJECTED | {"lora_n_bias": zeros(E, R)},
        "lora_n_bias must be None",
        "projections hold",
    ),
    "projected-and-router_bias": (
        PROJECTED | {"router_bias": zeros(E)},
        "router_bias must be None",
        "projections hold",
    ),
    "projected-and-experts": (
        PROJECTED | {"expert_weight": zeros(E, D, D)},
        "expert_weight must be None",
        "projections",
    ),
    "hidden-scalar": ({"hidden": zeros()}, "hidden must be", "()"),
    "attn-shape": ({"attn_output": zeros(4, D + 1)}, "attn_output must have shape (4, 8)", "(4, 9)"),
    "leading": ({"attn_output": zeros(2, 2, D)}, "attn_output", "(2, 2, 8)"),
    "shared-shape": ({"shared_weight": zeros(D, D + 1)}, "shared_weight must have shape (8, 8)", "(8, 9)"),
    "lora_a-shape": ({"lora_a": zeros(E, R, D + 1)}, "lora_a must have shape (3, 2, 8)", "(3, 2, 9)"),
    "lora_a-dims": ({"lora_a": zeros(R, D)}, "lora_a must be [E, r, d]", "(2, 8)"),
    "lora_n-shape": ({"lora_n": zeros(E, R, R + 1)}, "lora_n must have shape (3, 2, 2)", "(3, 2, 3)"),
    "lora_b-shape": ({"lora_b": zeros(E, R, D)}, "lora_b must have shape (3, 8, 2)", "(3, 2, 8)"),
    "router-shape": ({"router_weight": zeros(E, D + 1)}, "router_weight must have shape (3, 8)", "(3, 9)"),
    "router-dims": ({"router_weight": zeros(D)}, "router_weight must be [E, d]", "(8,)"),
    "no-experts-in-router": ({"router_weight": zeros(0, D)}, "E >= 1", "(0, 8)"),
    "gumbel-shape": ({"gumbel": zeros(4, E + 1)}, "gumbel must have shape (4, 3)", "(4, 4)"),
    "mask-shape": ({"token_mask": zeros(5, dtype=torch.bool)}, "token_mask", "(5,)"),
    "residual-shape": ({"residual": zeros(4, 1)}, "residual must have shape (4, 8)", "(4, 1)"),
    "shared_bias-shape": ({"shared_bias": zeros(1)}, "shared_bias must have shape (8,)", "(1,)"),
    "lora_b_bias-shape": ({"lora_b_bias": zeros(E)}, "lora_b_bias must have shape (3, 8)", "(3,)"),
    "device": ({"lora_b": torch.zeros(E, D, R, device="meta")}, "lora_b must be on hidden's device cpu", "meta"),
    "mask-device": ({"token_mask": torch.ones(4, dtype=torch.bool, device="meta")}, "token_mask must be on", "meta"),
    "seed-device": ({"seed": torch.zeros((), dtype=torch.int64, device="meta")}, "seed must be on", "meta"),
    "seed-shape": ({"seed": torch.zeros(1, dtype=torch.int64)}, "seed must be", "(1,)"),
    "seed-size": ({"seed": 2**64}, "seed must fit 64 bits", str(2**64)),
    "tau-zero": ({"tau": 0.0}, "tau must be above 0", "0.0"),
    "tau-negative": ({"tau": -1.0}, "tau must be above 0", "-1.0"),
    "tau-nan": ({"tau": float("nan")}, "tau must be above 0", "nan"),
    "tau-underflow": ({"tau": 1e-37}, "tau must be above 0, at least 1e-30", "1e-37"),
    "scale": ({"scale": float("inf")}, "scale must be finite", "inf"),
    "two-noises": ({"gumbel": zeros(4, E), "seed": 1}, "gumbel and seed were both given", ""),
    "in-part": ({"lora_n": None}, "lora_a, lora_b, router_weight without lora_n", ""),
    "no-router": ({"router_weight": None}, "without router_weight", ""),
    "router-alone": ({"lora_a": None, "lora_n": None, "lora_b": None}, "router_weight without lora_a", ""),
    "both-experts": ({"expert_weight": zeros(E, D, D)}, "lora_a must be None", "full-rank"),
    "backend": ({"backend": "cuda"}, "backend must be one of auto, torch, triton", "'cuda'"),
    "shared-bias-alone": ({"shared_weight": None, "shared_bias": zeros(D)}, "shared_bias must be None", ""),
}
NO_EXPERTS = dict.fromkeys(("lora_a", "lora_n", "lora_b", "router_weight"))
BAD_VALUES |= {
    "seed-without-experts": (NO_EXPERTS | {"seed": 1}, "seed must be None", "no experts"),
    "noise-without-experts": (NO_EXPERTS | {"gumbel": zeros(4, E)}, "gumbel must be None", "no experts"),
    "bias-without-experts": (NO_EXPERTS | {"router_bias": zeros(E)}, "router_bias must be None", "no experts"),
    "full-rank-with-inner-bias": (
        NO_EXPERTS | {"expert_weight": zeros(E, D, D), "router_weight": zeros(E, D), "lora_a_bias": zeros(E, R)},
        "lora_a_bias must be None",
        "full-rank",
    ),
}
BAD_TYPES = {
    "hidden-none": ({"hidden": None}, "hidden must be a tensor", "None"),
    "hidden-int": ({"hidden": zeros(4, D, dtype=torch.int64)}, "hidden must be float64", "torch.int64"),
    "weight-complex": ({"shared_weight": zeros(D, D, dtype=torch.complex64)}, "shared_weight", "torch.complex64"),
    "weight-list": ({"lora_b": [1.0]}, "lora_b must be a tensor", "list"),
    "mask-float": ({"token_mask": zeros(4)}, "token_mask must be a bool tensor", "torch.float32"),
    "mask-list": ({"token_mask": [True] * 4}, "token_mask must be a bool tensor", "list"),
    "tau-str": ({"tau": "a"}, "tau must be a float", "str"),
    "scale-none": ({"scale": None}, "scale must be a float", "NoneType"),
    "scale-bool": ({"scale": True}, "scale must be a float", "bool"),
    "projections-not-a-pair": ({"projections": zeros(4, E, R)}, "projections must be a pair", "Tensor"),
    "projections-in-part": ({"projections": (zeros(4, E, R), None)}, "projections[1] must be a tensor", "NoneType"),
    "projections-int": (
        PROJECTED | {"projections": (zeros(4, E, R, dtype=torch.int64), zeros(4, E))},
        "projections[0] must be",
        "int64",
    ),
    "seed-float": ({"seed": 1.0}, "seed must be an int", "float"),
    "seed-dtype": ({"seed": torch.tensor(1.0)}, "seed must be an int", "torch.float32"),
}


def call(**changes):
    arguments = Case(leading=(4,), d=D, num_experts=E, rank=R).make(torch.float32)
    return hycam_modulation(**arguments | changes)


def test_the_unchanged_call_runs():
    assert call(seed=1).hidden_states.shape == (4, D)


@pytest.mark.parametrize(("changes", "wanted", "given"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_value_errors(changes, wanted, given):
    with pytest.raises(ValueError, match="hycam_modulation") as error:
        call(**changes)
    assert wanted in str(error.value)
    assert given in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "wanted", "given"), BAD_TYPES.values(), ids=BAD_TYPES.keys())
def test_type_errors(changes, wanted, given):
    with pytest.raises(TypeError, match="hycam_modulation") as error:
        call(**changes)
    assert wanted in str(error.value)
    assert given in str(error.value)


def test_import_needs_torch_alone():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['triton', 'transformers', 'peft', 'numpy', 'hycam']));"
        "import hycam_kernels, torch; x = torch.ones(2, 4);"
        "hycam_kernels.hycam_modulation(x, x, torch.eye(4), None, None, None, None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
