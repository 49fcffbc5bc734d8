"""torch.compile's kernels for the reference, from its graph: the groups that its scheduler fuses, without their code.

The graph is scheduled for a CPU: for a GPU, torch asks the device. Which operations share a kernel follows from their
sizes and order on both; for a GPU a reduction may be split in two, and a product padded. A group reads and writes each
tensor once, so what these kernels take is a lower bound too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.machine.calls import Operation, reference_work
from benchmarks.op.shapes import Shape


def inductor_operations(shape: Shape) -> list[Operation]:
    """Products and fused groups of the reference's forward and backward, in their order."""
    found: list[Operation] = []

    def schedule(module: torch.fx.GraphModule, inputs: Sequence[Tensor], **options) -> Any:
        record_original_output_strides(module)
        graph = GraphLowering(module, is_backward=options.get("is_backward", False))
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            for node in graph.scheduler.nodes:
                name = "product" if node.is_extern() else "group"
                found.append(Operation(name, node.estimate_flops() or 0, node.get_read_write_buffers_sizes()))
        return make_boxed_func(module.forward)

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return compile_fx(module, inputs, inner_compile=schedule)

    torch._dynamo.reset()
    with FakeTensorMode():
        reference_work(shape, "cpu", lambda call: torch.compile(call, backend=backend, fullgraph=True, dynamic=False))
    return found
