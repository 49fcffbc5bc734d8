"""Which of PEFT's tests HyCAM can't pass, and why; each must fail, and by that reason's error.

The `conftest.py` of `suite.py`. It leaves out the tests that take no settings, since those build LoRA or prompt tuning.
"""

import re

import pytest

from hycam.errors import InputError

DIFFERENCES = [
    (
        r"test_(merge_layers|safe_merge|delete_merged_adapter|disable_adapters_with_merging|forward_b?float16)",
        None,
        (NotImplementedError, InputError),
        "the modulation depends on the input, so it can't be merged into weights",
    ),
    (
        r"test_adding_multiple_adapters_with_bias_raises$",
        None,
        InputError,
        "bias is a flag: the projections' own biases, no mode 'all' that trains the backbone's",
    ),
    (
        r"test_in_features_out_features_exposed$",
        None,
        AssertionError,
        "an attention is adapted, which has no in_features",
    ),
    (
        r"test_training_decoders_(layer_indexing|gradient_checkpointing)$",
        lambda kwargs: not kwargs.get("train_router", True),
        AssertionError,
        "every parameter with the method's prefix should have a gradient, and the router is frozen",
    ),
    (
        r"test_training_decoders_(layer_indexing|gradient_checkpointing)$",
        lambda kwargs: kwargs.get("train_norms", False),
        AssertionError,
        "no parameter of the backbone should have a gradient, and its norms are trained",
    ),
]


def pytest_collection_modifyitems(items):
    kept = []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if getattr(params.get("config_cls"), "__name__", "") != "SuiteConfig":
            continue
        kwargs = params["config_kwargs"]
        if kwargs.get("train_norms") and "OPT" in params.get("model_id", ""):
            continue  # refused when the adapter is made: HyCAM doesn't know OPT's norms
        kept.append(item)
        for name, concerns, error, reason in DIFFERENCES:
            if re.match(name, item.originalname) and (concerns is None or concerns(kwargs)):
                item.add_marker(pytest.mark.xfail(reason=reason, raises=error, strict=True))
    items[:] = kept
