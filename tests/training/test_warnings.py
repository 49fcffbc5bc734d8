"""What a run warns of, before its model is loaded."""

from pathlib import Path

import pytest
import torch

from hycam.training.method import MethodConfig
from hycam.training.prepare import prepare
from tests.training.runs import run_recipe


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
        warning = MethodConfig("hycam", preset="paper", options=options).rounding(dtype)
        assert (warning is not None and "trained norms and modules_to_save" in warning) == warned
    assert MethodConfig("hycam", preset="paper").rounding(dtype) is None
