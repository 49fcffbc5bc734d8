"""PEFT and transformers carry the methods: what they promise of any adapter."""

import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hycam.errors import InputError
from hycam.methods import MoeLoraConfig, MoeLoraLinear, MultiLoraConfig, MultiLoraLinear
from hycam.methods.low_rank import LowRankLinear
from tests.adapter.builders import batch
from tests.methods.builders import adapted_model, adapter, gradients_of, inputs, layer, moelora, multilora, randomise
from tests.models import tiny_model
from tests.versions import transformers_takes_this_peft

METHODS = pytest.mark.parametrize("config", [multilora, moelora])


def logits(model):
    return model.eval()(**batch()).logits.detach()


def parameters(model, adapter="default"):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n and f".{adapter}." in n}


@pytest.fixture
def saved(request, tmp_path):
    """A trained adapter in a folder, its backbone in another, and its logits."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), request.param())
    randomise(model, scale=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(model), parameters(model)


SAVED = pytest.mark.parametrize("saved", [multilora, moelora], indirect=True)


@METHODS
def test_all_linear_layers_but_the_head_by_default(config):
    model = get_peft_model(tiny_model(), config())
    adapted = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert len(adapted) == 2 * 7
    assert not any("lm_head" in name for name in adapted)
    assert torch.equal(logits(model), logits(tiny_model()))


@METHODS
def test_targets_and_layers(config):
    model = get_peft_model(tiny_model(), config(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]))
    adapted = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert [name.partition("layers.")[2] for name in adapted] == ["1.self_attn.q_proj", "1.mlp.down_proj"]
    model = get_peft_model(tiny_model(), config(exclude_modules=["q_proj"]))
    adapted = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert len(adapted) == 12


@METHODS
@pytest.mark.parametrize(
    ("targets", "message"),
    [(["self_attn"], "matching model.layers.0.self_attn, a LlamaAttention; want linear layers"), (["nope"], "nope")],
)
def test_targets_that_can_not_be_adapted_leave_the_model_alone(config, targets, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(target_modules=targets))
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: got 0"),
        ({"r": 2.0}, "r: got 2.0"),
        ({"lora_alpha": 0}, "lora_alpha: got 0"),
        ({"lora_alpha": "8"}, "lora_alpha: got '8'"),
        ({"lora_dropout": 1.0}, "lora_dropout: got 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout: got -0.1"),
        ({"target_modules": None}, "target_modules: got None"),
        ({"target_modules": []}, "target_modules: got []"),
        ({"layers_to_transform": [0]}, "layers_to_transform: got [0] with target_modules='all-linear'"),
        ({"layers_to_transform": -1, "target_modules": ["q_proj"]}, "layers_to_transform: got -1"),
    ],
)
@METHODS
def test_a_bad_value_is_refused_by_name(config, settings, message):
    with pytest.raises(InputError) as error:
        config(**settings)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (MultiLoraConfig, {"num_adapters": 0}, "num_adapters: got 0"),
        (MoeLoraConfig, {"num_experts": True}, "num_experts: got True"),
        (MoeLoraConfig, {"top_k": 0}, "top_k: got 0"),
        (MoeLoraConfig, {"num_experts": 2}, "top_k: got 3, want at most num_experts=2"),
        (MoeLoraConfig, {"gate_correction": "sqrt"}, "gate_correction: got 'sqrt', want one of none, engineering"),
    ],
)
def test_a_bad_value_of_one_method(config, settings, message):
    with pytest.raises(InputError) as error:
        config(**settings)
    assert str(error.value).startswith(message)


@SAVED
def test_the_settings_come_back(saved):
    folder, _, _ = saved
    config = PeftConfig.from_pretrained(folder / "adapter")
    model = PeftModel.from_pretrained(tiny_model(), folder / "adapter")
    assert type(config) is type(model.peft_config["default"])
    assert config.r == 4 and config.lora_alpha == 6


@SAVED
def test_names_in_the_file(saved):
    folder, _, live = saved
    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    names = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    kind = "multilora" if any("multilora" in name for name in live) else "moelora"
    assert names == {f"{kind}_A", f"{kind}_B", "multilora_scale" if kind == "multilora" else "moelora_gate"}
    assert len(state) == 3 * 14
    files = sorted(path.name for path in (folder / "adapter").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@SAVED
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_keeps_every_bit(saved, low_cpu_mem_usage, dtype):
    folder, want, weights = saved
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype),
        folder / "adapter",
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert not any(p.requires_grad for p in model.parameters())
    got = parameters(model)
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], weight) for name, weight in weights.items())
    if dtype == torch.float32:
        assert torch.equal(logits(model), want)
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")), want)


@SAVED
def test_a_reloaded_adapter_trains_on(saved):
    folder, _, _ = saved
    model = PeftModel.from_pretrained(tiny_model(), folder / "adapter", is_trainable=True).train()
    model(**batch()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 14


@transformers_takes_this_peft
@SAVED
def test_transformers_load_adapter(saved):
    folder, want, _ = saved
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.load_adapter(folder / "adapter")
    assert torch.equal(logits(model), want)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder / "base")))


@SAVED
def test_the_card_says_what_to_import(saved):
    folder, _, live = saved
    kind, name = ("MULTILORA", "MultiLoRA") if any("multilora" in key for key in live) else ("MOELORA", "MoE-LoRA")
    card = (folder / "adapter" / "README.md").read_text()
    assert f"## Loading this {name} adapter" in card
    assert "import hycam" in card and f"KeyError: '{kind}'" in card


@METHODS
def test_generate(config):
    """With and without a cache the same tokens, and others than the backbone's."""
    model = adapted_model(config()).eval()
    prompt = batch()["input_ids"][2:]
    tokens = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    plain = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(tokens, plain)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False), tokens)


@METHODS
def test_disable_unload_and_train_again(config):
    model = adapted_model(config())
    base = logits(tiny_model())
    assert not torch.equal(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    bare = model.unload()
    assert not any(isinstance(module, LowRankLinear) for module in bare.modules())
    assert bare.state_dict().keys() == tiny_model().state_dict().keys()
    assert torch.equal(logits(bare), base)
    assert torch.equal(logits(get_peft_model(bare, config())), base)


@METHODS
def test_two_adapters(config, tmp_path):
    """Add, switch, both at once (their sum), save apart, delete."""
    model = adapted_model(config(target_modules=["q_proj"], layers_to_transform=[0]), dtype=torch.float64)
    alone = logits(model)
    model.add_adapter("other", config(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[0]))
    assert torch.equal(logits(model), alone), "an added adapter is not active"
    assert all(".other" not in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("other")
    assert all(".other" in name for name, p in model.named_parameters() if p.requires_grad)
    randomise(model, seed=3, scale=0.1)
    other = logits(model)
    model.base_model.set_adapter(["default", "other"])
    made = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(made(x), made.base_layer(x) + made.delta("default", x) + made.delta("other", x))

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(dtype=torch.float64), tmp_path, autocast_adapter_dtype=False)
    again.load_adapter(tmp_path / "other", "other")
    torch.testing.assert_close(logits(again), alone)
    again.set_adapter("other")
    torch.testing.assert_close(logits(again), other)

    model.delete_adapter("default")
    assert not parameters(model, "default")
    assert torch.equal(logits(model), other)


@METHODS
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_dtypes_on_a_bfloat16_backbone(config, autocast_adapter_dtype):
    """The adapter is in float32, or the backbone's dtype where PEFT is told so; the output in the backbone's."""
    settings = config(gate_correction="engineering") if config is moelora else config()
    model = get_peft_model(
        tiny_model(dtype=torch.bfloat16), settings, autocast_adapter_dtype=autocast_adapter_dtype
    ).train()
    randomise(model, scale=0.1)
    want = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {want}
    out = model(**batch())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {want}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()


@METHODS
def test_checkpointing_changes_no_gradient(config):
    def taken(**settings):
        model = adapted_model(config())
        if settings:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
            model.enable_input_require_grads()
        model(**batch()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain = taken()
    for reentrant in (False, True):
        for name, grad in taken(use_reentrant=reentrant).items():
            assert torch.equal(grad, plain[name])


@pytest.mark.parametrize(
    "config", [multilora(), moelora(), moelora(gate_correction="engineering")], ids=["multilora", "moelora", "riemoe"]
)
def test_a_layer_compiles_without_graph_breaks(config):
    made, x = layer(config), inputs(5)
    want = made(x)
    got = torch.compile(made, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want)
    leaves = [x, *adapter(made).values()]
    upstream = torch.randn_like(want)
    for mine, theirs in zip(gradients_of(got, upstream, leaves), gradients_of(want, upstream, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@METHODS
def test_the_mode_follows_the_model(config):
    model = get_peft_model(tiny_model().eval(), config(lora_dropout=0.5))
    assert not any(module.training for module in model.modules() if isinstance(module, LowRankLinear))
    randomise(model)
    assert torch.equal(logits(model), logits(model))


@METHODS
def test_inject(config):
    model = inject_adapter_in_model(config(target_modules=["q_proj"]), tiny_model())
    model.train()(**batch()).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


@transformers_takes_this_peft
@METHODS
def test_lora_beside_it(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns about every second adapter
        model = tiny_model()
        model.add_adapter(LoraConfig(r=4, target_modules=["up_proj"]), adapter_name="lora")
        model.add_adapter(config(target_modules=["q_proj"]), adapter_name="mine")
    model.set_adapter(["lora", "mine"])
    model.train()(**batch()).loss.backward()
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None}
    assert {"mine", "lora"} <= trained


def test_merging_moe_lora_is_refused_with_the_reason():
    model = adapted_model(moelora())
    want = logits(model)
    for method in ("merge_and_unload", "merge_adapter"):
        with pytest.raises(NotImplementedError, match=r"MoE-LoRA can't be merged .* the gates depend on the input"):
            getattr(model, method)()
    assert torch.equal(logits(model), want)


@METHODS
def test_per_sample_adapters_are_refused(config):
    model = adapted_model(config())
    with pytest.raises(ValueError, match="adapter_names: got a value, want none"):
        model(**batch(), adapter_names=["default"] * 3)


@METHODS
def test_a_quantised_base_layer_is_wrapped(config):
    """Anything that has in_features and out_features: a dynamically quantised layer stands for the others."""
    quantised = torch.ao.nn.quantized.dynamic.Linear(7, 6)
    quantised.set_weight_bias(torch.quantize_per_tensor(torch.randn(6, 7), 0.05, 0, torch.qint8), torch.zeros(6))
    made = (MultiLoraLinear if config is multilora else MoeLoraLinear)(quantised, config())
    x = torch.randn(3, 7)
    assert torch.equal(made(x), quantised(x))
    randomise(made)
    made(x).sum().backward()
