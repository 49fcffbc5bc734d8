"""Traced activations against those that the CPU's allocator hands out."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from hycam.planning.engines import engine_of
from hycam.planning.plan import plan_memory
from hycam.training.loss import loss_by_parts
from hycam.training.prepare import adapted
from tests.planning.cases import batch, config, recipe


def measured(run, family, checkpointing):
    """Bytes that the allocator has handed out between a forward and a backward pass, and the most on the way."""
    dtype = run.backbone.dtype
    model = AutoModelForCausalLM.from_config(config(family), dtype=getattr(torch, dtype))
    model = adapted(model, run.method).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    inputs = batch()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward, loss_by_parts(model):
        loss = model(**inputs, use_cache=False).loss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        loss.backward()
    saved, first = _walk(forward)
    _, second = _walk(backward)
    return saved, max(first, saved + second)


def _walk(profiled):
    """Bytes at the end, and the most on the way there."""
    now = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return now, peak


@pytest.mark.parametrize(
    ("family", "dtype", "checkpointing"),
    [
        ("llama", "float32", None),
        ("llama", "bfloat16", False),
        ("gemma2", "float32", True),
        ("gpt_neox", "float32", None),
        ("smollm3", "bfloat16", None),
        ("qwen3_moe", "bfloat16", None),
    ],
)
def test_activations(family, dtype, checkpointing):
    trainer = {}
    if checkpointing is not None:
        trainer = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    run = recipe(dtype, **trainer)
    (plan,) = plan_memory(run, config(family), engine_of(run), [1])
    saved, peak = measured(run, family, checkpointing)
    assert plan.saved_activations == pytest.approx(saved, rel=0.1)
    assert plan.activations == pytest.approx(peak, rel=0.1)
