"""The Riemannian preconditioner against a dense loop over experts; the gates' own learning rate."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hycam.errors import InputError
from hycam.methods import MoeLoraLinear, RiemannianPreconditioner, set_gate_learning_rate
from tests.adapter.builders import batch
from tests.methods.builders import adapted_model, adapter, inputs, layer, moelora, multilora
from tests.models import tiny_model


def moe_layers(model):
    return [module for module in model.modules() if isinstance(module, MoeLoraLinear)]


def dense(made, delta, adapter_name="default"):
    """Both gradients of every expert, one system at a time, by torch.linalg.inv."""
    weights = adapter(made, adapter_name)
    grads_a, grads_b = [], []
    for a, b, grad_a, grad_b in zip(
        weights["moelora_A"].detach(),
        weights["moelora_B"].detach(),
        weights["moelora_A"].grad,
        weights["moelora_B"].grad,
        strict=True,
    ):
        identity = torch.eye(len(a), dtype=a.dtype)
        grads_a.append(torch.linalg.inv(b.T @ b + delta * identity) @ grad_a)
        grads_b.append(grad_b @ torch.linalg.inv(a @ a.T + delta * identity))
    return torch.stack(grads_a), torch.stack(grads_b)


def backward(model):
    model(**batch()).loss.backward()
    return model


@pytest.mark.parametrize("delta", [0.0, 1e-6, 0.5])
def test_every_expert_of_every_layer(delta, monkeypatch):
    """Layers of several shapes in one factorisation for each of two ranks; gates and other weights are left alone."""
    model = adapted_model(moelora(target_modules=["q_proj", "v_proj"]), dtype=torch.float64)
    model.add_adapter("other", moelora(r=3, target_modules=["v_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    pairs = [(made, name) for made in moe_layers(model) for name in made.adapter_configs]
    for made, name in pairs:
        nn.init.normal_(adapter(made, name)["moelora_B"])
    backward(model)
    wanted = [dense(made, delta, name) for made, name in pairs]
    assert {grad.shape for grad, _ in wanted} == {(4, 4, 32), (4, 3, 32)}
    assert len({grad.shape for _, grad in wanted}) == 4
    others = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and "moelora_A" not in name and "moelora_B" not in name
    }
    assert others
    stacks, factorise = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda gram: (stacks.append(gram.shape), factorise(gram))[1])
    RiemannianPreconditioner(model, delta)(None)
    assert sorted(stacks) == [(2 * 2 * 2 * 4, 3, 3), (2 * 2 * 2 * 4, 4, 4)]
    for (made, name), (grad_a, grad_b) in zip(pairs, wanted, strict=True):
        torch.testing.assert_close(adapter(made, name)["moelora_A"].grad, grad_a, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(adapter(made, name)["moelora_B"].grad, grad_b, rtol=1e-7, atol=1e-9)
    for name, parameter in model.named_parameters():
        if name in others:
            assert torch.equal(parameter.grad, others[name])


def test_a_singular_system_keeps_its_plain_gradient():
    """delta = 0 and an expert's B of rank 1, another's zero: those two A-gradients stay, all else is conditioned."""
    made = layer(moelora(), 7, 6)
    weights = adapter(made)
    with torch.no_grad():
        weights["moelora_B"][1] = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 5.0)).double() / 7
        weights["moelora_B"][2] = 0
    generator = torch.Generator().manual_seed(0)
    for parameter in weights.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    plain = weights["moelora_A"].grad.clone()
    with torch.no_grad():
        regular = weights["moelora_B"].clone()
        regular[1:3] = torch.eye(6, 4, dtype=torch.float64)
        kept = weights["moelora_B"].clone()
        weights["moelora_B"].copy_(regular)
        want_a, want_b = dense(made, 0.0)
        weights["moelora_B"].copy_(kept)
    RiemannianPreconditioner(made, 0.0)(None)
    assert torch.equal(weights["moelora_A"].grad[1:3], plain[1:3])
    torch.testing.assert_close(weights["moelora_A"].grad[[0, 3]], want_a[[0, 3]], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(weights["moelora_B"].grad, want_b, rtol=1e-7, atol=1e-9)


def test_a_matrix_that_rounding_makes_regular_is_singular():
    """Equal columns give a Gram matrix that Cholesky takes for regular, with a last pivot of rounding alone."""
    made = layer(moelora(num_experts=1, top_k=1), 7, 50)
    weights = adapter(made)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # columns that add up to each other, not just alike: their pivot is rounding, not zero
        column = torch.randn(50, 3, generator=generator, dtype=torch.float64)
        weights["moelora_B"][0] = torch.cat([column, column @ torch.tensor([[0.1], [0.7], [1.3]]).double()], dim=1)
    gram = weights["moelora_B"][0].T @ weights["moelora_B"][0]
    assert torch.linalg.cholesky_ex(gram.detach()).info == 0
    for parameter in weights.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    plain = weights["moelora_A"].grad.clone()
    RiemannianPreconditioner(made, 0.0)(None)
    assert torch.equal(weights["moelora_A"].grad, plain)


def test_factors_of_any_size_are_conditioned_alike():
    """A small B is no singular one: the test is relative."""
    made = layer(moelora())
    with torch.no_grad():
        adapter(made)["moelora_B"].mul_(1e-8)
    made(inputs(9)).square().sum().backward()
    want_a, _ = dense(made, 0.0)
    RiemannianPreconditioner(made, 0.0)(None)
    torch.testing.assert_close(adapter(made)["moelora_A"].grad, want_a, rtol=1e-6, atol=0)


def test_before_adams_moments_and_from_the_old_factors():
    """A step of the hooked optimizer is a plain step with the dense loop's gradients."""
    hooked, plain = adapted_model(moelora(), dtype=torch.float64), adapted_model(moelora(), dtype=torch.float64)
    steps = []
    for model in (hooked, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if model is hooked:
            optimizer.register_step_pre_hook(RiemannianPreconditioner(model, 1e-3))
        for _ in range(2):
            backward(model)
            if model is plain:
                for made in moe_layers(model):
                    grads = dense(made, 1e-3)
                    adapter(made)["moelora_A"].grad.copy_(grads[0])
                    adapter(made)["moelora_B"].grad.copy_(grads[1])
            optimizer.step()
            optimizer.zero_grad()
        steps.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, want in steps[1].items():
        torch.testing.assert_close(steps[0][name], want, rtol=1e-6, atol=1e-9)
    unhooked = adapted_model(moelora(), dtype=torch.float64)
    assert any((p - steps[0][name]).abs().max() > 1e-3 for name, p in unhooked.named_parameters() if p.requires_grad)


def test_bfloat16_gradients():
    made = layer(moelora()).bfloat16()
    made(inputs(9).bfloat16()).square().sum().backward()
    double = layer(moelora())
    with torch.no_grad():
        for name, parameter in adapter(made).items():
            adapter(double)[name].copy_(parameter)
            adapter(double)[name].grad = parameter.grad.double()
    RiemannianPreconditioner(made)(None)
    want = dense(double, 1e-6)
    for name, grad in zip(("moelora_A", "moelora_B"), want, strict=True):
        got = adapter(made)[name].grad
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), grad, rtol=2**-8, atol=1e-5 * float(grad.abs().max()))


def test_the_start_where_b_is_zero():
    model = get_peft_model(tiny_model(), moelora())
    backward(model)
    before = [adapter(made)["moelora_A"].grad.clone() for made in moe_layers(model)]
    RiemannianPreconditioner(model)(None)
    assert not any(grad.any() for grad in before)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_without_a_gradient_it_raises():
    model = adapted_model(moelora())
    with pytest.raises(RuntimeError, match="no expert has a gradient"):
        RiemannianPreconditioner(model)(None)


@pytest.mark.parametrize("delta", [-1e-9, float("nan"), "1", None, True])
def test_a_bad_delta(delta):
    with pytest.raises(InputError, match="delta: got"):
        RiemannianPreconditioner(layer(moelora()), delta)


def test_another_method_has_nothing_to_condition():
    model = adapted_model(multilora())
    with pytest.raises(InputError, match=r"model: got PeftModel.* without a MoE-LoRA layer"):
        RiemannianPreconditioner(model)
    with pytest.raises(InputError, match="without a MoE-LoRA layer"):
        set_gate_learning_rate(torch.optim.SGD(model.parameters(), 0.1), model, 0.5)


def test_the_gates_step_at_their_own_rate():
    """Plain SGD shows it: every parameter moves by its group's rate times its gradient."""
    model = adapted_model(moelora())
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in named.items() if "q_proj" in name]
    rest = [p for name, p in named.items() if "q_proj" not in name]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 0.5}, {"params": rest}], lr=0.2)
    set_gate_learning_rate(optimizer, model, 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    backward(model)
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer.step()
    for name, parameter in named.items():
        rate = 0.5 * (0.02 if "moelora_gate" in name else 0.2)
        decay = 0.5 if "q_proj" in name else 0.0
        step = rate * (parameter.grad + decay * before[name])
        torch.testing.assert_close(parameter.detach(), before[name] - step)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.01, 0.1])
    del scheduler


@pytest.mark.parametrize("ratio", [0, -1, float("inf"), "1"])
def test_a_bad_ratio(ratio):
    model = adapted_model(moelora())
    with pytest.raises(InputError, match="gate_lr_ratio: got"):
        set_gate_learning_rate(torch.optim.SGD(model.parameters(), 0.1), model, ratio)
