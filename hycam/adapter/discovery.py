"""Where HyCAM goes by itself: a decoder's self-attentions, found by what they take and are, not by the model's name."""

import inspect
from collections import Counter
from collections.abc import Collection, Iterator

import transformers
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hycam.adapter.architectures import hidden_size_of, model_type_of
from hycam.errors import InputError

# What this transformers' own models call their cache, as an argument and in what they return.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"

# A causal attention keeps keys and values; an encoder's and a vision tower's forward don't take them.
_CACHES = ("past_key_values", "past_key_value", "layer_past")
# transformers 5.24 has one name for them and for a recurrent mixer's state.
_ANY_CACHE = "cache"
_HEADS = ("head_dim", "head_size", "num_heads", "num_attention_heads")
# What a module calls the stream that it adds its result to.
_STREAMS = ("residual", "input_tensor")


def self_attention_names(model: nn.Module, layers: Collection[int] | None = None) -> set[str]:
    """The shortest names, as `target_modules` takes them, that match every self-attention of the decoder and no more.

    A self-attention is a module inside a decoder layer, with heads, whose forward takes `hidden_states`,
    `attention_mask` and a cache of keys and values and isn't declared to return a bare tensor. Cross-attention, and
    attention of another model inside this one (by its configuration), is left out. Nothing runs, so a model on the meta
    device will do.

    Args:
        model: the backbone, adapted already or not.
        layers: indices of the layers that are wanted; None: all.

    Raises:
        InputError: where there is none, or where HyCAM can't modulate what it returns; it says why.
    """
    modules = dict(_own_modules(model))
    found = [name for name, module in modules.items() if _is_self_attention(name, module)]
    decoder_type = _decoder_type(model)
    types = {name: model_type_of(modules[name]) or decoder_type for name in found}
    own = [name for name in found if decoder_type in (None, types[name])]
    if not own:
        others = ", ".join(sorted(set(map(str, types.values()))))
        reason = (
            f"those it has belong to the models inside it ({others})"
            if found
            else "it has no module with heads that takes hidden_states, attention_mask and a cache of keys and values"
        )
        raise InputError(f"{_wanted(model)}: {reason}")
    counts = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name in own:
        obstacle = "is shared by several layers" if counts[id(modules[name])] > 1 else _obstacle(model, modules, name)
        if obstacle is not None:
            raise InputError(f"{_wanted(model)}: {name}, a {type(modules[name]).__name__}, {obstacle}")
    names = _shortest_names(own, modules)
    if names is None:
        raise InputError(f"{_wanted(model)}: the names of those it has, {own[0]} the first, are others' too")
    if layers is not None:  # PEFT takes a whole path for wanted, whatever its index
        names -= {name for name in own if not any(f".{index}." in f".{name}" for index in layers)}
    return names


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by path, without those that an adapter brought."""
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped += (f"{name}.",)
            module = module.get_base_layer()
        yield name, module


def _is_self_attention(name: str, module: nn.Module) -> bool:
    *holders, own_name = name.split(".")
    # a decoder layer, an element of the outermost list, may have the form of its attention
    is_inside_layer = any(holder.isdigit() for holder in holders)
    if not is_inside_layer or "cross" in own_name or "encoder" in own_name or not _is_attention(module):
        return False
    # so may a module around the attention
    return not any(_is_attention(inner) for inner in module.modules() if inner is not module)


def _is_attention(module: nn.Module) -> bool:
    signature = inspect.signature(module.forward)
    taken = list(signature.parameters)
    returned = signature.return_annotation
    return (
        taken[:1] == ["hidden_states"]
        and "attention_mask" in taken
        and _takes_keys_and_values(module, taken)
        and (returned is inspect.Signature.empty or "tuple" in str(returned).lower())
        and any(hasattr(module, heads) for heads in _HEADS)
    )


def _takes_keys_and_values(module: nn.Module, taken: Collection[str]) -> bool:
    # a recurrent mixer convolves its input along the tokens, by itself; an attention does so in a module of its own
    is_mixer = any(isinstance(child, nn.Conv1d) for child in module.children())
    return any(cache in taken for cache in _CACHES) or (_ANY_CACHE in taken and not is_mixer)


def _obstacle(model: nn.Module, modules: dict[str, nn.Module], name: str) -> str | None:
    """Why HyCAM can't modulate what this attention returns; None: it can."""
    holder = name.rpartition(".")[0]
    # in a decoder layer itself the MLP may take the stream; in a module between layer and attention it is the output's
    is_layer = holder.rpartition(".")[2].isdigit()
    takers = [modules[name], *(() if is_layer else modules[holder].children())]
    if any(stream in inspect.signature(taker.forward).parameters for taker in takers for stream in _STREAMS):
        return "has the residual stream added to its output before it reaches the layer"
    hidden_size = hidden_size_of(modules[name]) or hidden_size_of(model)
    taken = next((inner.in_features for inner in modules[name].modules() if hasattr(inner, "in_features")), hidden_size)
    if hidden_size is not None and taken != hidden_size:
        return f"takes {taken} features where the model has {hidden_size}"
    return None


def _decoder_type(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    return getattr(config, "model_type", None)


def _shortest_names(paths: list[str], modules: Collection[str]) -> set[str] | None:
    """Endings of the paths that no other module's path has; None where a whole path is another's ending."""
    for length in range(1, max(path.count(".") for path in paths) + 2):
        names = {".".join(path.split(".")[-length:]) for path in paths}
        endings = tuple(f".{name}" for name in names)
        if sum(f".{path}".endswith(endings) for path in modules) == len(paths):
            return names
    return None


def _wanted(model: nn.Module) -> str:
    return (
        f"target_modules: got none for {type(model).__name__} (model_type {model_type_of(model)!r}), want the names of "
        "self-attention modules that return (output, ...), as in ['self_attn']"
    )
