"""What a run warns of, before its model is loaded."""

from pathlib import Path

import pytest
import torch

from hycam.training.method import MethodConfig
from hycam.training.prepare import prepare
from tests.training.runs import run_recipe

_SMALL_BETA2 = {"adam_beta2": 0.95}


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", True), ("auto", False), ("float32", False)])
def test_full_fine_tuning_in_16_bits_is_warned_of(
    tmp_path: Path, backbone: Path, caplog: pytest.LogCaptureFixture, dtype: str, warned: bool
) -> None:
    """Steps at 2e-5 are lost in most bfloat16 weights; the checkpoint of `auto` here is float32."""
    weight = torch.nn.Parameter(0.02 * torch.randn(10_000).bfloat16())
    before, optimizer = weight.detach().clone(), torch.optim.AdamW([weight], lr=2e-5, weight_decay=0.0)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert (weight == before).float().mean() > 0.65
    recipe = run_recipe(tmp_path, backbone, backbone={"dtype": dtype})
    recipe.method = MethodConfig("full")
    prepare(recipe, resume=False, overwrite=False)
    assert ("78% of bfloat16 weights" in caplog.text) == warned
    recipe.method = MethodConfig("lora", options={"r": 2})
    caplog.clear()
    prepare(recipe, resume=False, overwrite=False)
    assert "16 bits" not in caplog.text


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", True), (torch.float16, True), ("float32", False)])
def test_trained_norms_in_16_bits_are_warned_of(dtype: object, warned: bool) -> None:
    """PEFT's float32 is for the adapter's own weights: a norm that is trained beside it stays as the backbone is."""
    for options in ({"train_norms": True}, {"modules_to_save": ["lm_head"]}):
        (*rounding,) = MethodConfig("hycam", preset="paper", options=options).losses_in_16_bits(dtype, _SMALL_BETA2)
        assert ("trained norms and modules_to_save" in "".join(rounding)) == warned
    assert not list(MethodConfig("hycam", preset="paper").losses_in_16_bits(dtype, {}))
    assert not list(MethodConfig("full").losses_in_16_bits(dtype, {"deepspeed": "zero2"}))


@pytest.mark.parametrize(
    ("dtype", "beta2", "warned"),
    [
        ("bfloat16", 0.999, True),
        ("bfloat16", 0.997, True),
        ("bfloat16", 0.99, False),
        ("float16", 0.9996, True),
        ("float16", 0.999, False),
        ("float32", 0.999, False),
    ],
)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_an_adamw_that_forgets_no_gradient_is_warned_of(dtype: str, beta2: float, warned: bool, optim: str) -> None:
    """As PyTorch's own does not: four time constants after one gradient its second moment has not halved."""
    weight = torch.nn.Parameter(torch.zeros(64, dtype=getattr(torch, dtype)))
    optimizer = torch.optim.AdamW([weight], lr=0.0, betas=(0.9, beta2), fused=optim == "adamw_torch_fused")
    weight.grad = torch.linspace(5, 10, 64).to(weight.dtype)
    optimizer.step()
    second_moment = optimizer.state[weight]["exp_avg_sq"]
    first = second_moment.float().clone()
    weight.grad.zero_()
    for _ in range(round(4 / (1 - beta2))):
        optimizer.step()
    left = second_moment.float() / first
    assert left.min() > 0.45 if warned else left.max() < 0.1
    trainer = {"adam_beta2": beta2, "optim": optim}
    for method in (MethodConfig("full"), MethodConfig("lora", autocast_adapter_dtype=False, options={"r": 2})):
        warnings = [line for line in method.losses_in_16_bits(dtype, trainer) if "adam_beta2" in line]
        assert len(warnings) == warned
    assert not list(MethodConfig("lora", options={"r": 2}).losses_in_16_bits(dtype, trainer)), "it is float32"
    assert not any(
        "adam_beta2" in line for line in MethodConfig("full").losses_in_16_bits(dtype, trainer | {"optim": "adafactor"})
    )


@pytest.mark.parametrize(("in_float32", "warned"), [(True, False), (False, True)])
def test_a_run_warns_of_the_default_beta2(
    tmp_path: Path, backbone: Path, caplog: pytest.LogCaptureFixture, in_float32: bool, warned: bool
) -> None:
    recipe = run_recipe(
        tmp_path, backbone, backbone={"dtype": "bfloat16"}, method={"autocast_adapter_dtype": in_float32}
    )
    prepare(recipe, resume=False, overwrite=False)
    assert ("trainer.adam_beta2: 0.999 with weights that train in bfloat16" in caplog.text) == warned
