"""From data sets to batches: sources, prompts, splits, tokens, packing, collation."""

from hycam_kernels.versions import require

FLOORS = {"datasets": "4"}
require(FLOORS)
