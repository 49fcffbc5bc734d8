"""The sizes that are measured, and the arithmetic and traffic that the op needs at each, for its floor."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Shape:
    """One call: T tokens, d features, E experts of rank r."""

    tokens: int
    d: int
    num_experts: int = 5
    rank: int = 64

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        return f"T={self.tokens} d={self.d} E={self.num_experts} r={self.rank}"


# a batch of 2 x 1,200 tokens and a full one, at the hidden sizes of 1B, 7B, 8B and 13B models; the most telling first
TRAINING = (Shape(8192, 4096), Shape(2400, 2048), Shape(2400, 4096), Shape(8192, 5120), Shape(2400, 3584))
DECODE = (Shape(1, 4096), Shape(16, 4096), Shape(64, 4096))
CPU = (Shape(1024, 1024), Shape(300, 512))
CPU_QUICK = CPU[1]
CPU_DECODE = (Shape(1, 512), Shape(16, 512))
# a token of a 576-wide model, and a call so small that it's bound by the operations in it
CPU_INFERENCE = (Shape(1, 576), Shape(80, 128, rank=16))
# one number changed at a time, for plots against it
SWEEP = (*(Shape(tokens, 4096) for tokens in (512, 1200, 4800)), *(Shape(8192, d) for d in (2048, 3072)))
CPU_SWEEP = (Shape(128, 512), Shape(512, 512), Shape(1024, 512), Shape(300, 256), Shape(300, 1024))
# from a tiny model's width to a 1B model's, and one width by the row's length
CPU_PRODUCTS = (Shape(300, 512, rank=16), Shape(1024, 1024), Shape(2400, 576), Shape(512, 2048))
CPU_LENGTHS = tuple(Shape(tokens, 576) for tokens in (1024, 4096, 16384))
# so small that the device always waits for the host
LAUNCH = Shape(80, 128, rank=16)

PASSES = ("forward", "backward", "both")


def flops(shape: Shape, pass_: str) -> int:
    """Floating-point operations of the op's matrix products, two per multiply-add, with N folded into A.

    Forward: S, V, Z and the logits. Backward: Z again, the gradients of V and B from dZ, and both gradients (of h and
    of the weight) of the three products with h.
    """
    T, d, E, Er = shape.tokens, shape.d, shape.num_experts, shape.num_experts * shape.rank
    forward = 2 * T * d * (d + 2 * Er + E)
    backward = 4 * T * d * (d + Er + E) + 6 * T * d * Er
    return {"forward": forward, "backward": backward, "both": forward + backward}[pass_]


def traffic(shape: Shape, pass_: str, itemsize: int = 2) -> int:
    """Bytes that the op must read and write at least: every external tensor once.

    Forward: h, h_att and the weights in; h_out and the kept S and V out. Backward: the upstream gradient, h, h_att, S,
    V and the weights in; the gradients of h, h_att and the weights out.
    """
    T, d, Er = shape.tokens, shape.d, shape.num_experts * shape.rank
    weights = d * d + 2 * Er * d + Er * shape.rank + shape.num_experts * d
    forward = 4 * T * d + T * Er + weights
    backward = 6 * T * d + T * Er + 2 * weights
    return itemsize * {"forward": forward, "backward": backward, "both": forward + backward}[pass_]


def decode_traffic(shape: Shape, itemsize: int = 2) -> int:
    """Bytes of an inference step: W_s, the folded M = N A, B, W_r, and h, h_att, h_out."""
    T, d, Er = shape.tokens, shape.d, shape.num_experts * shape.rank
    return itemsize * (d * d + 2 * Er * d + shape.num_experts * d + 3 * T * d)


def floor_us(flop_count: int, byte_count: int, flops_per_s: float, bytes_per_s: float) -> float:
    """The larger of the time of the arithmetic and the time of the traffic, in microseconds."""
    return 1e6 * max(flop_count / flops_per_s, byte_count / bytes_per_s)
