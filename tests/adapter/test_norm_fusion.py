"""`fuse_norm`: the same adapter, its projections made in the pass of the norm before the attention."""

import copy
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import hycam
import hycam.adapter.attention
from hycam import HyCAMAttention, HyCAMConfig, hotswap_adapter
from tests.adapter.builders import batch, config, gradients, largest_error, layers_of, randomise
from tests.models import tiny_model

NORMS = {"gpt2": "ln_1"}


@pytest.fixture
def projected(monkeypatch) -> list[str]:
    """One entry for each call of `norm_project`: its kind."""
    calls = []
    norm_project = hycam.adapter.attention.norm_project

    def record(*args, **kwargs):
        calls.append(kwargs["kind"])
        return norm_project(*args, **kwargs)

    monkeypatch.setattr(hycam.adapter.attention, "norm_project", record)
    return calls


def decoder_layers(model):
    return next(list(module) for module in model.modules() if isinstance(module, nn.ModuleList))


def base_model(family="llama", dtype=torch.float64):
    """A tiny model; in float64 its RMSNorms are torch's, since transformers' compute in float32."""
    model = tiny_model(family, dtype=dtype)
    for layer in decoder_layers(model) if dtype == torch.float64 else ():
        norm = getattr(layer, NORMS.get(family, "input_layernorm"))
        if not isinstance(norm, nn.LayerNorm):
            layer.input_layernorm = nn.RMSNorm(32, eps=norm.variance_epsilon, dtype=dtype)
            layer.input_layernorm.weight.data.copy_(torch.linspace(0.5, 1.5, 32))
    return model


def adapted(family="llama", dtype=torch.float64, **settings):
    settings = {"noise": "never", "balance_coef": 1.0} | settings
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(base_model(family, dtype), config(**settings), autocast_adapter_dtype=False)
    randomise(model)
    return model.train()


def step(model, scale=1.0):
    """Logits and every gradient of one training step."""
    output = model(**batch())
    (output.loss * scale).backward()
    return {"logits": output.logits.detach()} | gradients(model)


SETTINGS = {
    "paper": ("llama", {}),
    "noise": ("llama", {"noise": "train", "tau": 0.8}),
    "trained-norms": ("llama", {"train_norms": True}),
    "released": ("llama", {"modulation": "residual", "routing": "hard", "lora_alpha": 8.0, "train_norms": True}),
    "experts-only": ("llama", {"shared": "none", "recompute": True, "train_router": False}),
    "one-layer": ("llama", {"layers_to_transform": [1], "shared": "slora", "balance_scope": "model"}),
    "gpt2": ("gpt2", {"modulation": "residual"}),
    "gpt2-trained-norms": ("gpt2", {"train_norms": True}),
    "gpt_neox": ("gpt_neox", {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_and_gradients_are_those_without_it(name, projected):
    family, settings = SETTINGS[name]
    results = []
    for fuse in (False, True):
        model = adapted(family, fuse_norm=fuse, **settings)
        torch.manual_seed(5)
        results.append(step(model))
    want, got = results
    assert len(projected) == (1 if "layers_to_transform" in settings else 2)
    assert set(projected) == {"rms" if family == "llama" else "layer"}
    assert largest_error(got, want) < 1e-12


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_is_as_good_as_without_it(family, autocast, projected):
    """At most twice the error of the same adapter without it, against float64 with the same weights."""

    def run(dtype, fuse):
        model = adapted(family, torch.bfloat16, fuse_norm=fuse, train_norms=True).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            return step(model)

    dtype = torch.float32 if autocast else torch.bfloat16
    truth, eager, got = run(torch.float64, False), run(dtype, False), run(dtype, True)
    assert len(projected) == 2
    for name, want in truth.items():
        error, allowed = ((result[name].double() - want).norm() / want.norm() for result in (got, eager))
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps / 4, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, projected):
    want = step(adapted(fuse_norm=True))
    model = adapted(fuse_norm=True, train_norms=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert largest_error(step(model), want) < 1e-12
    assert len(projected) == 6
    assert not any(layer.projections.get() for layer in layers_of(model).values())


@pytest.mark.parametrize("train_norms", [False, True])
def test_compiles_into_one_graph(train_norms):
    torch._dynamo.reset()
    model = adapted(fuse_norm=True, train_norms=train_norms)
    want = step(model, 0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**batch())
    (output.loss * 0.5).backward()
    assert largest_error({"logits": output.logits.detach()} | gradients(model), want) < 1e-12


def test_evaluation_does_not_fuse(projected):
    models = [adapted(fuse_norm=fuse).eval() for fuse in (False, True)]
    want, got = (model(**batch()).logits for model in models)
    assert torch.equal(got, want)
    tokens = [model.generate(input_ids=batch()["input_ids"], max_new_tokens=3, do_sample=False) for model in models]
    assert torch.equal(*tokens)
    assert not projected


def test_disabling_goes_back_to_the_base_model(projected):
    want = base_model()(**batch()).logits
    model = adapted(fuse_norm=True, train_norms=True)
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, want)
    assert not projected
    model(**batch())
    assert len(projected) == 2


def test_several_adapters(projected):
    """Active together, the first that fuses takes the norm's pass; switched, added and deleted as ever."""

    def results(first, second):
        torch.manual_seed(5)
        model = adapted(fuse_norm=first, train_norms=True)
        model.add_adapter("other", config(r=2, num_experts=2, noise="never", fuse_norm=second))
        randomise(model, seed=3)
        found = []
        for names in (["default", "other"], ["other"], ["default"]):
            model.base_model.set_adapter(names)
            found.append(step(model))
        model.delete_adapter("default")
        model.base_model.set_adapter("other")
        return [*found, step(model)]

    want = results(False, False)
    for fused, count in (((True, True), 8), ((True, False), 4), ((False, True), 6)):
        projected.clear()
        for a, b in zip(results(*fused), want, strict=True):
            assert largest_error(a, b) < 1e-12
        assert len(projected) == count


def test_saved_adapters_load_either_way(tmp_path):
    models = {fuse: adapted(dtype=torch.float32, fuse_norm=fuse, train_norms=True).eval() for fuse in (False, True)}
    want = models[True](**batch()).logits
    states = {}
    for fuse, model in models.items():
        model.save_pretrained(tmp_path / str(fuse))
        states[fuse] = load_file(tmp_path / str(fuse) / "adapter_model.safetensors")
    assert states[True].keys() == states[False].keys()
    assert all(torch.equal(value, states[False][name]) for name, value in states[True].items())
    assert tiny_model().state_dict().keys() == models[True].unload().state_dict().keys()
    for saved in (False, True):
        for loaded in (False, True):
            settings = HyCAMConfig.from_pretrained(tmp_path / str(saved))
            settings.fuse_norm = loaded
            model = PeftModel.from_pretrained(tiny_model(), tmp_path / str(saved), config=settings)
            assert torch.equal(model(**batch()).logits, want)
            hotswap_adapter(model, tmp_path / str(not saved))
            assert torch.equal(model(**batch()).logits, want)


def test_unload_leaves_no_trace():
    model = adapted(fuse_norm=True, train_norms=True)
    base = model.unload()
    assert not any("forward" in vars(module) for module in base.modules())
    assert torch.equal(base.eval()(**batch()).logits, base_model()(**batch()).logits)


def test_a_copy_stands_on_its_own(projected):
    model = adapted(fuse_norm=True)
    twin = copy.deepcopy(model)
    want = step(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hycam_" in name:
                parameter.zero_()
    assert largest_error(step(twin), want) == 0
    assert len(projected) == 4


def test_keeps_less_than_the_norm_and_the_products_apart():
    """An activation a layer: transformers' RMSNorm keeps its input in float32, the fused one as it came."""

    def kept(fuse):
        model = adapted(dtype=torch.bfloat16, fuse_norm=fuse)
        given = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in given:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.enable_input_require_grads()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch())
        return sum(storages.values())

    tokens, d, layers = 27, 32, 2
    assert kept(True) <= kept(False) - layers * tokens * d * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": "none"}, "fuse_norm: got True with experts='none', want False"),
        ({"experts": "full"}, "fuse_norm: got True with experts='full', want False"),
        ({"bias": True}, "fuse_norm: got True with bias=True, want False"),
    ],
)
def test_settings_without_projections_to_make(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        HyCAMConfig(fuse_norm=True, **settings)


@pytest.mark.parametrize(("family", "reason"), [("gemma2", "multiplies by 1 \\+ weight"), ("olmo2", "without a norm")])
def test_architectures_whose_norm_is_another(family, reason):
    base = tiny_model(family)
    with pytest.raises(ValueError, match=f"fuse_norm: got True for model_type '{family}', want False: .*{reason}"):
        get_peft_model(base, config(fuse_norm=True))
    assert not layers_of(base), "a refused model is left as it was"


def test_an_unknown_architecture():
    base = tiny_model()
    base.config.model_type = "other"
    with pytest.raises(
        ValueError, match=r"fuse_norm: got True for model_type 'other', want False: HyCAM doesn't know its norm"
    ):
        get_peft_model(base, config(fuse_norm=True, target_modules=["self_attn"]))
    assert not layers_of(base)


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.RMSNorm(32, elementwise_affine=False, eps=1e-6), nn.Identity()])
def test_a_norm_of_another_kind(norm):
    base = tiny_model()
    base.model.layers[1].input_layernorm = norm
    with pytest.raises(ValueError, match=f"fuse_norm: got True with a {type(norm).__name__} .* want an RMSNorm"):
        get_peft_model(base, config(fuse_norm=True))
    assert not layers_of(base), "a refused model is left as it was"


def test_by_hand(projected):
    want = step(adapted())
    model = base_model().train()
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn = HyCAMAttention(layer.self_attn, config(fuse_norm=True, noise="never", balance_coef=1.0), 32)
    with pytest.raises(RuntimeError, match=r"fuse_norm=True needs the whole model: call hycam.bind\(model\)"):
        model(**batch())
    hycam.bind(model)
    randomise(model)
    got = {f"base_model.model.{name}" if name != "logits" else name: value for name, value in step(model).items()}
    assert largest_error(got, want) < 1e-12
    model.model.layers[0].input_layernorm = copy.copy(base_model().model.layers[0].input_layernorm)
    with pytest.raises(RuntimeError, match=r"fuse_norm=True: the norm before the attention did not make"):
        model(**batch())
    hycam.bind(model)
    projected.clear()
    model(**batch())
    assert len(projected) == 2


def test_binding_again_and_another_forward_on_the_norm():
    """Binding twice leaves one fusion; a forward that someone else put on the norm stays theirs."""
    model = adapted(fuse_norm=True)
    want = step(model)
    hycam.bind(model)
    assert largest_error(step(model), want) == 0
    norm = model.base_model.model.model.layers[0].input_layernorm
    theirs = norm.__dict__["forward"] = lambda hidden: nn.RMSNorm.forward(norm, hidden)
    model.unload()
    assert norm.__dict__["forward"] is theirs
