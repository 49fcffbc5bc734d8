"""HyCAM's modulation as one op: a reference, a PyTorch backend with a hand-written backward, and fused kernels.

Importing this package needs torch alone.
"""

from hycam_kernels.versions import require

FLOORS = {"torch": "2.9"}
require(FLOORS)

from hycam_kernels.modulation import explain_backend, hycam_modulation
from hycam_kernels.norm_projection import norm_project
from hycam_kernels.output import HyCAMOutput, NormProjectOutput
from hycam_kernels.philox import gumbel_noise

__all__ = ["HyCAMOutput", "NormProjectOutput", "explain_backend", "gumbel_noise", "hycam_modulation", "norm_project"]
