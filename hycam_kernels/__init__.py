"""HyCAM's modulation as one op: a reference, a PyTorch backend with a hand-written backward, and fused kernels.

Importing this package needs torch alone.
"""

from .modulation import explain_backend, hycam_modulation
from .norm_projection import norm_project
from .output import HyCAMOutput, NormProjectOutput
from .philox import gumbel_noise

__all__ = ["HyCAMOutput", "NormProjectOutput", "explain_backend", "gumbel_noise", "hycam_modulation", "norm_project"]
