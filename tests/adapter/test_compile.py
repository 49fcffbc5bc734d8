"""torch.compile takes the adapted model whole, and changes neither outputs nor gradients."""

import pytest
import torch
from peft import get_peft_model

import hycam
from hycam import hotswap_adapter, router_statistics
from tests.adapter.builders import adapted_model, batch, config, gradients, largest_error, randomise
from tests.models import tiny_model

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def test_evaluation():
    model = adapted_model().eval()
    with torch.no_grad():
        want = model(**batch()).logits
        torch.testing.assert_close(compiled(model)(**batch()).logits, want)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"modulation": "residual", "train_norms": True, "routing": "hard"}, marks=pytest.mark.slow),
        pytest.param({"shared": "slora", "experts": "full", "bias": True}, marks=pytest.mark.slow),
    ],
)
def test_training(scope, settings):
    model = adapted_model(noise="never", balance_coef=1.0, balance_scope=scope, **settings)
    (model(**batch()).loss * 0.5).backward()
    want, load = gradients(model), [kept.load for kept in router_statistics(model).values()]
    (compiled(model)(**batch()).loss * 0.5).backward()
    assert largest_error(gradients(model), want) < TOLERANCE
    for kept, wanted in zip(router_statistics(model).values(), load, strict=True):
        torch.testing.assert_close(kept.load, wanted)


def test_noise_is_drawn_anew_in_every_call():
    model = adapted_model()
    run = compiled(model)
    first = run(**batch()).logits
    assert not torch.equal(run(**batch()).logits, first)


def test_one_layer_at_a_time():
    model = adapted_model(noise="never", balance_coef=1.0)
    model(**batch()).loss.backward()
    want = gradients(model)
    for layer in model.base_model.model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    model(**batch()).loss.backward()
    assert largest_error(gradients(model), want) < TOLERANCE


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_with_checkpointing_in_pieces(use_reentrant, whole):
    model = adapted_model(noise="never", balance_coef=1.0)
    (model(**batch()).loss * 0.5).backward()
    want = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for module in [model] if whole else model.base_model.model.model.layers:
        module.compile(backend="aot_eager")
    (model(**batch()).loss * 0.5).backward()
    assert largest_error(gradients(model), want) < TOLERANCE


@pytest.mark.filterwarnings("ignore:the model returns no loss")
def test_without_labels_the_scale_is_one_and_cannot_follow_a_loss():
    model = adapted_model(noise="never", balance_coef=1.0)
    inputs = batch()
    labels = inputs.pop("labels")
    model(**inputs).logits[labels != -100].sum().backward()
    want = gradients(model)
    loss = compiled(model)(**inputs).logits[labels != -100].sum()
    with pytest.raises(RuntimeError, match="pass it labels"):
        hycam.track_loss(model, loss)
    loss.backward()
    assert largest_error(gradients(model), want) < TOLERANCE


def test_hotswap_and_switching(tmp_path):
    """The next tokens are those of the new adapter; swapped in place, without another compilation."""

    def trained(seed):
        model = get_peft_model(tiny_model(num_hidden_layers=1), config(modulation="residual", noise="never")).eval()
        randomise(model, seed=seed)
        return model

    @torch.no_grad()
    def tokens(run):
        return run(**batch()).logits.argmax(-1)

    model, other = trained(2), trained(9)
    other.save_pretrained(tmp_path)
    first, second = tokens(model), tokens(other)
    assert not torch.equal(first, second)
    model.add_adapter("other", config(modulation="residual", noise="never"))
    run = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(tokens(run), first)
    with torch.compiler.set_stance("fail_on_recompile"):
        hotswap_adapter(model, tmp_path)
        assert torch.equal(tokens(run), second)
    model.set_adapter("other")
    with model.disable_adapter():
        base = tokens(model)
    assert torch.equal(tokens(run), base)
    hotswap_adapter(model, tmp_path, adapter_name="other")
    assert torch.equal(tokens(run), second)
