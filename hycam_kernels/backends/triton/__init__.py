"""The ops by fused Triton kernels: `kernels` has these, `configs` their block sizes by GPU family."""
