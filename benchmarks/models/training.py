"""Whole training steps and attention layers as work to measure, by method."""

from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.harness.timing import Work
from benchmarks.models.backbones import ModelShape, build, randomise_zeros
from benchmarks.models.methods import HYCAM, METHODS
from benchmarks.op.checks import ROUNDING, WrongResultError, compare, generator_state, results
from benchmarks.op.peers import Arguments, Outputs, Peer
from hycam import HyCAMAttention
from hycam.live_bytes import LiveBytes

_BATCHES = 4


@dataclass(frozen=True)
class Setting:
    """How a step runs; its name in records."""

    checkpointing: bool = False
    liger: bool = False

    def __str__(self) -> str:
        return ", ".join(
            name for name, on in (("checkpointing", self.checkpointing), ("liger", self.liger)) if on
        ) or "plain"  # fmt: skip


PLAIN = Setting()


def adapted(
    name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device, setting: Setting = PLAIN
) -> nn.Module:
    """The backbone of a shape under a method, in training mode; the same weights for every method and dtype of a shape.

    No trainable parameter is zero, as they are after the first steps.
    """
    with generator_state(device):
        model = METHODS[name](build(shape, dtype, device, liger=setting.liger), shape).train()
        if name != "full" and device.type != "meta":
            randomise_zeros(model)
    if setting.checkpointing:
        base_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def base_model(model: nn.Module) -> PreTrainedModel:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def token_ids(shape: ModelShape, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    words = shape.config.vocab_size
    return torch.randint(words, (shape.batch, shape.length), generator=generator, device=device)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of every next token. Where nothing is trained, the embeddings ask for the backward."""
    embeddings = base_model(model).get_input_embeddings()(ids)
    if not embeddings.requires_grad:
        embeddings.requires_grad_()
    return model(inputs_embeds=embeddings, labels=ids).loss


class TrainingStep:
    """Forward, backward and AdamW on batches that take turns; gradients are dropped after each step.

    Args:
        name: a key of `METHODS`; "frozen" has no optimizer, its backward ends at the embeddings.
    """

    def __init__(
        self, name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device, setting: Setting = PLAIN
    ) -> None:
        self._before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        self.model = adapted(name, shape, dtype, device, setting)
        self.batches = [token_ids(shape, device, seed) for seed in range(_BATCHES)]
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=2e-5, fused=True) if trainable else None
        self.trainable_parameters = sum(parameter.numel() for parameter in trainable)

    def forward(self, index: int) -> Tensor:
        return loss_of(self.model, self.batches[index % _BATCHES])

    def run(self, index: int) -> None:
        self.forward(index).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def work(self) -> Work:
        return Work(lambda index: index, self.run, _BATCHES)

    def resident(self) -> list[Tensor]:
        """Parameters, buffers and the optimizer's state, which is there after the first step; the batches too."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        moments = [value for values in state for value in values.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *moments, *self.batches]

    def optimizer_bytes(self) -> int:
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        return sum(value.nbytes for values in state for value in values.values() if isinstance(value, Tensor))

    def memory(self) -> dict[str, int]:
        """Bytes of one step, once the optimizer has its state.

        Returns:
            ``resident_bytes`` (parameters, optimizer, batches), ``optimizer_bytes`` of them, ``kept_bytes`` for the
            backward after a forward, and ``peak_bytes``, all in all. On CUDA by the allocator, on a CPU by count.
        """
        self.run(0)
        found = self._allocated() if self.batches[0].device.type == "cuda" else self._counted()
        return found | {"optimizer_bytes": self.optimizer_bytes()}

    def _allocated(self) -> dict[str, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = self.forward(0)
        kept = torch.cuda.memory_allocated() - before
        del loss
        self.run(0)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - self._before
        return {"resident_bytes": before - self._before, "kept_bytes": kept, "peak_bytes": peak}

    def _counted(self) -> dict[str, int]:
        tensors = self.resident()
        resident = sum({tensor.untyped_storage(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
        with LiveBytes(tensors) as count:
            loss = self.forward(0)
            kept = count.live
            del loss
            self.run(0)
        return {"resident_bytes": resident, "kept_bytes": kept, "peak_bytes": resident + count.peak}


def check_step(
    name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device, setting: Setting = PLAIN
) -> None:
    """Check a method on two layers of the backbone's width.

    HyCAM's loss and gradients are compared with those of its reference in float64, without noise. The other methods
    are packages': their first loss must be the bare backbone's, and every gradient finite and not zero.

    Raises:
        WrongResultError: naming the method, what is wrong and by how much.
    """
    cut = shape.cut()
    if name in HYCAM:
        got = _step_results(name, cut, dtype, device, setting)
        truth = _step_results("hycam-eager", cut, dtype, device, PLAIN, torch.float64)
        compare(name, got, truth, _step_results("hycam-eager", cut, dtype, device, PLAIN))
        return
    ids = token_ids(cut, device)
    with generator_state(device), torch.no_grad():
        start = loss_of(METHODS[name](build(cut, dtype, device, liger=setting.liger), cut), ids)
    with torch.no_grad():
        bare = loss_of(adapted("frozen", cut, dtype, device).double(), ids)
    error = abs(start.double() / bare - 1).item()
    if not error <= 4 * ROUNDING[dtype]:
        raise WrongResultError(f"{name}: the first loss is {error:.3g} from the bare backbone's: not timed")
    model = adapted(name, cut, dtype, device, setting)
    loss_of(model, ids).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and not (parameter.grad is not None and _is_useful(parameter.grad)):
            raise WrongResultError(f"{name}: {parameter_name} has no finite gradient that isn't zero: not timed")


def _is_useful(gradient: Tensor) -> bool:
    return bool(gradient.isfinite().all() and gradient.any())


def _step_results(
    name: str,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    setting: Setting,
    computed_in: torch.dtype | None = None,
) -> dict[str, Tensor]:
    model = without_noise(adapted(name, shape, dtype, device, setting)).to(computed_in or dtype)
    ids = token_ids(shape, device)
    embeddings = base_model(model).get_input_embeddings()(ids).detach()
    arguments: Arguments = {"embeddings": embeddings} | dict(model.named_parameters())
    return results(lambda given: (model(inputs_embeds=given["embeddings"], labels=ids).loss,), arguments)


def without_noise(model: nn.Module) -> nn.Module:
    """The model with its HyCAM layers' noise switched off: methods draw it in different ways."""
    for module in model.modules():
        if isinstance(module, HyCAMAttention):
            for config in module.adapter_configs.values():
                config.noise = "never"
    return model


class AttentionLayer:
    """One self-attention of a backbone under a method ("frozen": bare), called as the decoder layer calls it."""

    def __init__(self, name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        self.model = adapted(name, replace(shape, layers=1, vocabulary=512), dtype, device)
        self.name = name
        self.shape = shape
        self.decoder = base_model(self.model).get_decoder()
        self.attention = self.decoder.layers[0].self_attn
        positions = torch.arange(shape.length, device=device)[None]
        probe = torch.empty(0, dtype=dtype, device=device)
        self.positions = self.decoder.rotary_emb(probe, positions)

    def arguments(self, seed: int = 0) -> Arguments:
        """Random hidden states [batch, length, d] and the layer's parameters by name."""
        generator = torch.Generator(self.positions[0].device).manual_seed(seed)
        size = (self.shape.batch, self.shape.length, self.shape.config.hidden_size)
        dtype = next(self.attention.parameters()).dtype
        hidden = torch.randn(size, generator=generator, device=generator.device)
        named = dict(self.attention.named_parameters())
        return {"hidden": hidden.bfloat16().to(dtype).requires_grad_()} | named

    def call(self, arguments: Arguments) -> Outputs:
        cos, sin = self.positions
        dtype = arguments["hidden"].dtype
        output = self.attention(
            hidden_states=arguments["hidden"],
            position_embeddings=(cos.to(dtype), sin.to(dtype)),
            attention_mask=None,
        )
        return (output[0],)

    def peer(self) -> Peer:
        return Peer(self.name, "attention", self.call)


def check_attention(name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
    """Compare a layer's output and gradients with its reference in float64, without noise; two short rows.

    Raises:
        WrongResultError: as `checks.compare`.
    """
    cut = shape.cut()
    eager = name if name == "frozen" else "hycam-eager"

    def run(method: str, computed_in: torch.dtype) -> dict[str, Tensor]:
        layer = AttentionLayer(method, cut, dtype, device)
        without_noise(layer.model).to(computed_in)
        return results(layer.call, layer.arguments())

    compare(name, run(name, dtype), run(eager, torch.float64), run(eager, dtype))
