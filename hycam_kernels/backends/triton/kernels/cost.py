"""What a kernel must move and compute at least: the numerator of its speed-of-light."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Least traffic and arithmetic of one launch: every external tensor once, matrix products only.

    Attributes:
        bytes: read and written.
        flops: of the matrix products, two per multiply-add.
        sigmoids: evaluations of the logistic function, each two special-function instructions.
    """

    bytes: int
    flops: int
    sigmoids: int = 0
