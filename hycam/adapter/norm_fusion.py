"""`fuse_norm`: the norm before an attention makes its HyCAM layer's projections in the same pass."""

from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from hycam.adapter.architectures import fusible_norm
from hycam.adapter.attention import HyCAMAttention
from hycam.errors import InputError


class NormFusion:
    """Takes the place of one norm's forward, on this instance alone: module, parameters and names stay as they are.

    In training the norm runs as `norm_project` with the adapter's projections, returns h as ever, and hands V and the
    router's logits to the layer. Elsewhere, and where no active adapter fuses, its own forward runs.

    Args:
        norm: the norm before the attention of `layer`; it owns the weight that the fused pass reads.
        kind: "rms" or "layer".
        layer: the HyCAM layer.
    """

    def __init__(self, norm: nn.Module, kind: str, layer: HyCAMAttention) -> None:
        self.norm, self.kind, self.layer = norm, kind, layer
        self.eps = _epsilon(norm)
        # perhaps another package's, such as accelerate's, which loads the weights first
        self._replaced = norm.__dict__.get("forward")
        norm.__dict__["forward"] = self.forward

    def forward(self, hidden_in: Tensor) -> Tensor:
        adapter_name = self.layer.fused_adapter()
        if adapter_name is None:
            return self._own_forward(hidden_in)
        # fetched anew: sharded training swaps them between forwards
        weight: Any = self.norm.weight
        bias = getattr(self.norm, "bias", None)
        hidden, projections = self.layer.project(
            adapter_name, hidden_in, weight, norm_bias=bias, eps=self.eps, kind=self.kind
        )
        self.layer.projections.set(projections)
        return hidden

    def _own_forward(self, hidden_in: Tensor) -> Tensor:
        if self._replaced is not None:
            return self._replaced(hidden_in)
        # not kept as a bound method, which a pickle would bind to this class's forward
        return type(self.norm).forward(self.norm, hidden_in)

    def remove(self) -> None:
        """Give the norm its own forward back, unless another has taken this one's place."""
        if self.norm.__dict__.get("forward") == self.forward:
            del self.norm.__dict__["forward"]
            if self._replaced is not None:
                self.norm.__dict__["forward"] = self._replaced


def fusible_norms(decoder_layer: nn.Module, model_type: str | None) -> tuple[list[nn.Module], str]:
    """The norm before the attention with each copy of it that PEFT trains, and its kind.

    Raises:
        InputError: (a ValueError) where the architecture's norm can't be fused, or the one that is there isn't its own.
    """
    name, kind = fusible_norm(model_type)
    norm = decoder_layer.get_submodule(name)
    norms = [norm]
    if isinstance(norm, ModulesToSaveWrapper):
        norms = [norm.original_module, *norm.modules_to_save.values()]
    for norm in norms:
        is_of_kind = isinstance(norm, nn.LayerNorm) == (kind == "layer")
        if not is_of_kind or not isinstance(_epsilon(norm), float) or getattr(norm, "weight", None) is None:
            wanted = "a LayerNorm" if kind == "layer" else "an RMSNorm"
            raise InputError(
                f"fuse_norm: got True with a {type(norm).__name__} before the attention, want {wanted} there with a "
                "weight and an epsilon, or False"
            )
    return norms, kind


def _epsilon(norm: nn.Module) -> Any:
    """By transformers' name or torch's; None where the norm has neither."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
