import pytest
import torch
from peft import get_peft_model

from hycam import HyCAMConfig
from hycam.analysis.modulation import _evenly_spaced, prompt_modulation
from hycam.errors import InputError
from tests.models import tiny_model

IDS = [5, 6, 7, 8, 9]


def adapted_model():
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), HyCAMConfig(r=4, num_experts=3, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "hycam" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def test_is_what_the_attention_output_is_multiplied_by():
    """In evaluation h_out = h_att (1 + A_fusion): both are recorded around the first layer's attention."""
    model = adapted_model()
    modulation = prompt_modulation(model, IDS)
    assert [tensor.shape for tensor in modulation.values()] == [(5, 32), (5, 32)]
    name, first = next(iter(modulation.items()))
    seen = {}
    layer = model.get_submodule(name)
    handles = [
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.update(before=output[0][0])),
        layer.register_forward_hook(lambda module, args, output: seen.update(after=output[0][0])),
    ]
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen["after"], seen["before"] * (1 + first), rtol=1e-4, atol=1e-6)
    assert first.abs().max() > 0.05


def test_a_fresh_adapter_modulates_nothing():
    model = get_peft_model(tiny_model(), HyCAMConfig(r=4, num_experts=3, task_type="CAUSAL_LM"))
    assert all(torch.equal(tensor, torch.zeros(5, 32)) for tensor in prompt_modulation(model, IDS).values())


def test_leaves_no_hook_and_the_mode():
    model = adapted_model()
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    prompt_modulation(model, IDS)
    with pytest.raises(InputError):
        prompt_modulation(model, IDS, adapter_name="nobody")
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before
    assert all(module.training for module in model.modules())


def test_some_layers_are_spread_over_the_depth():
    names = [str(number) for number in range(32)]
    assert _evenly_spaced(names, None) == names
    assert _evenly_spaced(names, 40) == names
    assert _evenly_spaced(names, 4) == ["0", "10", "21", "31"]
    assert _evenly_spaced(names, 1) == ["31"]
    assert len(prompt_modulation(adapted_model(), IDS, max_layers=1)) == 1


@pytest.mark.parametrize(
    ("build", "ids", "options", "message"),
    [
        (tiny_model, IDS, {}, "LlamaForCausalLM without a HyCAM layer"),
        (adapted_model, [], {}, "input_ids: none given"),
        (adapted_model, IDS, {"max_layers": 0}, "max_layers: 0 given"),
        (adapted_model, IDS, {"adapter_name": "nobody"}, "'nobody'"),
    ],
)
def test_wrong_input_is_named(build, ids, options, message):
    with pytest.raises(InputError, match=message):
        prompt_modulation(build(), ids, **options)
