"""CAM alone, HyCAM, its ablations and the released code, as adapters of a model: each preset against its formula, token
by token and expert by expert.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model

from hycam import HyCAMConfig
from hycam_kernels import gumbel_noise
from tests.adapter.builders import by_saved_name, randomise
from tests.models import tiny_model

E, R, D = 3, 4, 32
# name of the preset -> which shared CAM, which experts
PRESETS = {
    "paper": ("full", "slora"),
    "shared_only": ("full", None),
    "full_spec": ("full", "full"),
    "spec_only": (None, "slora"),
    "inverse_peft": ("slora", "full"),
    "released_code": ("full", "slora"),
}


def silu(x):
    return x / (1 + torch.exp(-x))


def adapted(preset, dtype=torch.float32, **settings):
    model = get_peft_model(
        tiny_model(dtype=dtype),
        HyCAMConfig.preset(preset, r=R, **({} if preset == "shared_only" else {"num_experts": E}), **settings),
        autocast_adapter_dtype=False,
    )
    randomise(model)
    return model


def parameters(layer, dtype):
    """The adapter's parameters by the name that they have in a file."""
    named = {name: p for name, p in layer.named_parameters() if name.startswith("hycam_")}
    return {name.removeprefix("hycam_"): p.detach().to(dtype) for name, p in by_saved_name(named.items()).items()}


def fusion(preset, weights, h, noise):
    """A_fusion [T, d] of h [T, d]; noise [T, E] of the routing, or None."""
    shared, experts = PRESETS[preset]
    is_released = preset == "released_code"
    rows = []
    for t, token in enumerate(h):

        def project(name, x, k=None):
            weight = weights[name] if k is None else weights[name][k]
            if not is_released:
                return weight @ x
            bias = weights[name.replace("weight", "bias") if "." in name else f"{name}_bias"]
            return weight @ x + (bias if k is None else bias[k])

        total = torch.zeros_like(token)
        if shared == "full":
            total = total + silu(project("shared.weight", token))
        if shared == "slora":
            total = total + silu(
                weights["shared_lora_b"] @ (weights["shared_lora_n"] @ (weights["shared_lora_a"] @ token))
            )
        if experts is not None:
            scores = project("router.weight", token) + (0 if noise is None else noise[t].to(token.dtype))
            shares = (scores / 0.5).exp()
            shares = shares / shares.sum()
            if is_released:
                shares = torch.zeros_like(shares).index_fill(0, shares.argmax(), 1)
            for k in range(E):
                if experts == "full":
                    z = weights["expert_weight"][k] @ token
                else:
                    z = project("lora_b", project("lora_n", project("lora_a", token, k), k), k)
                total = total + shares[k] * silu((32 / R if is_released else 1) * z)
        rows.append(total)
    return torch.stack(rows)


def run(model, hidden, seed):
    """The residual stream after attention in the first decoder layer, h, h_att, and the noise that the layer drew."""
    block = model.get_base_model().model.layers[0]
    positions = model.get_base_model().model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    seen = {}
    handles = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0])),
        block.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(h=kwargs["hidden_states"]), with_kwargs=True
        ),
        block.self_attn.base_layer.register_forward_hook(lambda *call: seen.update(h_att=call[-1][0])),
    ]
    torch.manual_seed(seed)
    drawn = torch.randint(2**62, ())
    torch.manual_seed(seed)
    block(hidden, position_embeddings=positions)
    for handle in handles:
        handle.remove()
    return seen["stream"], seen["h"], seen["h_att"], gumbel_noise(drawn, hidden[..., 0].numel(), E)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_its_formula(preset, training):
    model = adapted(preset, torch.float64).train(training)
    hidden = torch.randn(2, 5, D, dtype=torch.float64)
    stream, h, h_att, noise = run(model, hidden, seed=11)
    layer = model.get_base_model().model.layers[0].self_attn
    draws = training or preset == "released_code"
    a = fusion(preset, parameters(layer, torch.float64), h.reshape(-1, D), noise if draws else None).view_as(hidden)
    want = (hidden + h_att) * (1 + a) if preset == "released_code" else hidden + h_att * (1 + a)
    torch.testing.assert_close(stream, want)
    assert a.abs().max() > 0.1


def test_the_released_code_to_float32_rounding():
    """For given weights and noise, no further from float64 than the formula itself is in float32."""
    model = adapted("released_code").train()
    hidden = torch.randn(4, 25, D)
    stream, h, h_att, noise = run(model, hidden, seed=5)
    layer = model.get_base_model().model.layers[0].self_attn

    def formula(dtype):
        a = fusion("released_code", parameters(layer, dtype), h.reshape(-1, D).to(dtype), noise)
        return (hidden + h_att).to(dtype) * (1 + a.view_as(hidden))

    exact = formula(torch.float64)
    error, rounding = (stream - exact).abs().max(), (formula(torch.float32) - exact).abs().max()
    assert 0 < rounding < 1e-4
    assert error <= 3 * rounding


@pytest.mark.parametrize("training", [True, False])
def test_the_released_decoder_layer(training):
    """The whole layer's output and gradients, in float64: the modulated residual stream, and the MLP of that. The
    forward takes the best expert of the noisy logits, in evaluation too, the backward goes through their softmax.
    """
    model = adapted("released_code", torch.float64).train(training)
    block = model.get_base_model().model.layers[0]
    hidden = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    output = {}
    handle = block.register_forward_hook(lambda module, args, result: output.update(out=result))
    _, h, h_att, noise = run(model, hidden, seed=7)
    handle.remove()
    layer = block.self_attn
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}

    w = {name.removeprefix("hycam_"): p for name, p in by_saved_name(layer.named_parameters()).items()}
    total = silu(h @ w["shared.weight"].T + w["shared.bias"])
    logits = h @ w["router.weight"].T + w["router.bias"] + noise.view(2, 5, E)
    soft = torch.softmax(logits / 0.5, -1)
    hard = torch.nn.functional.one_hot(logits.argmax(-1), E) + soft - soft.detach()
    for k in range(E):
        v = (h @ w["lora_a"][k].T + w["lora_a_bias"][k]) @ w["lora_n"][k].T + w["lora_n_bias"][k]
        z = v @ w["lora_b"][k].T + w["lora_b_bias"][k]
        total = total + hard[..., k : k + 1] * silu(32 / R * z)
    stream = (hidden + h_att) * (1 + total)
    want = stream + block.mlp(block.post_attention_layernorm(stream))
    torch.testing.assert_close(output["out"], want)
    upstream = torch.randn_like(want)
    leaves = [hidden, *trained.values()]
    mine = torch.autograd.grad(output["out"], leaves, upstream, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(want, leaves, upstream, allow_unused=True)
    assert sum(grad is not None for grad in mine) == len(leaves) == 1 + 2 + 8
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected)
    assert not w["router.weight"].requires_grad and not w["router.bias"].requires_grad


def test_the_released_codes_norms_are_trained_and_its_router_is_not():
    model = adapted("released_code").train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("layernorm" in name for name in trained) == 4
    assert not any("router" in name for name in trained)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_saves_reloads_and_generates(preset, tmp_path):
    model = adapted(preset, noise="never").eval()
    model.save_pretrained(tmp_path)
    prompt = torch.randint(3, 128, (1, 6))
    again = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(again(input_ids=prompt).logits, model(input_ids=prompt).logits)
    options = {"input_ids": prompt, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(**options), model.generate(**options))
    with model.disable_adapter():
        assert torch.equal(model(input_ids=prompt).logits, tiny_model()(input_ids=prompt).logits)


def test_trained_parameters_are_those_of_the_formulas():
    """Counted by hand, for two layers of width d: what the comparison's budgets rest on."""
    slora = 2 * R * D + R * R
    want = {
        "paper": D * D + E * slora + E * D,
        "shared_only": D * D,
        "full_spec": D * D + E * D * D + E * D,
        "spec_only": E * slora + E * D,
        "inverse_peft": slora + E * D * D + E * D,
    }
    for preset, count in want.items():
        assert adapted(preset).get_nb_trainable_parameters()[0] == 2 * count
