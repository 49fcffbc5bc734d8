"""From a recipe to a trained adapter: what a run needs, checked first; the run, its folder and its checkpoints."""

from hycam_kernels.versions import require

FLOORS = {"accelerate": "1.10"}
require(FLOORS)
