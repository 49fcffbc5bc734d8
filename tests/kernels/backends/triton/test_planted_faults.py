"""The tests of the kernels can fail: each planted fault makes one of them do so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
FORWARD, PRODUCT, BACKWARD, ROUTER, SHARED = (
    f"hycam_kernels/backends/triton/kernels/{name}.py"
    for name in ("fusion_forward", "product_forward", "fusion_backward_kernels", "router", "primitives")
)
SUM = "hycam_kernels/backends/triton/kernels/sum_parts.py"
ROUTER_WEIGHT = "hycam_kernels/backends/triton/kernels/router_weight_grad.py"
DECODE, NORM = (f"hycam_kernels/backends/triton/kernels/{name}.py" for name in ("decode", "norm_projection"))
BACKEND, NORM_BACKEND = (
    "hycam_kernels/backends/triton/modulation.py",
    "hycam_kernels/backends/triton/norm_projection.py",
)
# what a planted fault breaks: (file, the code, the fault)
FAULTS = {
    "fusion forward: no column mask": (FORWARD, "col_mask = cols < d\n", "col_mask = cols < d + 8\n"),
    "fusion forward: no row mask": (FORWARD, "row_mask = rows < tokens\n", "row_mask = rows < tokens + 1\n"),
    "forward: last expert dropped": (SHARED, "range(0, NUM_EXPERTS,", "range(0, NUM_EXPERTS - 1,"),
    "forward: residual not added": (
        SHARED,
        "stride_attn, mask)\n    stream = attn\n    if residual is not None:\n        stream += load_tile",
        "stride_attn, mask)\n    stream = attn\n    if residual is not None:\n        load_tile",
    ),
    "product forward: no column mask": (PRODUCT, "        col_mask = cols < d\n", "        col_mask = cols < d + 8\n"),
    "product forward: no row mask": (PRODUCT, "row_mask = rows < tokens\n", "row_mask = rows < tokens + 1\n"),
    "product forward: a whole last group": (
        PRODUCT,
        "tl.minimum(row_blocks - first, GROUP)",
        "GROUP",
    ),
    "product forward: the first strip of S for all": (PRODUCT, "tiles[index]", "tiles[0]"),
    "product forward: the first strip's columns for all": (PRODUCT, "start + index * BLOCK_STRIP", "start"),
    "product forward: strips from right to left": (
        PRODUCT,
        "return strips(left, ROWS, COLUMNS // 2, WIDTH) + strips(right, ROWS, COLUMNS // 2, WIDTH)",
        "return strips(right, ROWS, COLUMNS // 2, WIDTH) + strips(left, ROWS, COLUMNS // 2, WIDTH)",
    ),
    "product forward: shared bias dropped": (PRODUCT, "s_tile += tl.load(shared_bias", "tl.load(shared_bias"),
    "product forward: S kept without its bias": (
        PRODUCT,
        "s_tile.to(s.dtype.element_ty)",
        "tiles[index].to(s.dtype.element_ty)",
    ),
    "product forward: S's rows past the last": (
        PRODUCT,
        "mask=row_mask[:, None] & col_mask[None, :],\n            )",
        "mask=(rows < tokens + 1)[:, None] & col_mask[None, :],\n            )",
    ),
    "product forward: SiLU of S without S": (
        PRODUCT,
        "silu(a, silu_gate(a, SIGMOID), SIGMOID),\n            v",
        "silu_gate(a, SIGMOID),\n            v",
    ),
    "product forward: S not kept": (PRODUCT, "if x.keep else None", "if not x.keep else None"),
    "product: a feature past the last": (SHARED, "inside = (features < end)", "inside = (features < end + 1)"),
    "product: last block of features dropped": (
        SHARED,
        "range(start, end, BLOCK_K)",
        "range(start, end - BLOCK_K, BLOCK_K)",
    ),
    "expert tile: scale dropped": (SHARED, "return z * scale", "return z"),
    "resident tile: bias dropped": (SHARED, "z += bias.to(tl.float32)[None, :]", "z += 0.0"),
    "resident tile: bias of the first columns": (SHARED, "(expert * d + start)", "(expert * d)"),
    "SiLU: tanh's half dropped": (SHARED, "return a + a * gate", "return a * gate"),
    "SiLU: tanh's square dropped": (SHARED, "(1.0 - gate * gate)", "(1.0 - gate)"),
    "expert tile: rank mask dropped": (
        SHARED,
        "row_mask[:, None] & (ranks < RANK)",
        "row_mask[:, None] & (ranks < 999)",
    ),
    "expert tile: last rank block dropped": (SHARED, "range(0, RANK, BLOCK_R,", "range(0, RANK - BLOCK_R, BLOCK_R,"),
    "hard routing: last of a tie": (ROUTER, "tl.argmax(p, 1)", "tl.argmax(p, 1, tie_break_left=False)"),
    "stream grad: SiLU' without its second term": (SHARED, "(gate + a * gate * (1.0 - gate))", "gate"),
    "stream grad: upstream dropped": (BACKWARD, "(grad + through_stream)", "through_stream"),
    "stream grad: p's gradient weighted": (
        BACKWARD,
        "tl.sum(d_fusion * activation, 1)",
        "tl.sum(grad * activation, 1)",
    ),
    "stream grad: split ignored": (BACKWARD, "partial += (split.to(tl.int64) * tokens + rows)", "partial += rows"),
    "stream grad: p's sum of one block": (
        BACKWARD,
        "d_p[expert] + tl.sum(d_fusion * activation, 1),)\n            d_p",
        "tl.sum(d_fusion * activation, 1),)\n            d_p",
    ),
    "stream grad: columns of the next split": (BACKWARD, "tl.minimum(split * columns + columns, d)", "d"),
    "forward: first columns of a split for all": (
        FORWARD,
        "cols = start + tl.arange(0, BLOCK_D)",
        "cols = first + tl.arange(0, BLOCK_D)",
    ),
    "forward: first expert's V for all": (FORWARD, "v_tiles[expert]", "v_tiles[0]"),
    "forward: first expert's p for all": (FORWARD, "p[expert][:, None]", "p[0][:, None]"),
    "row grad: last expert dropped": (
        BACKWARD,
        "fusion += weight[:, None] * activation\n            next_d_p",
        "fusion += weight[:, None] * activation * (expert < NUM_EXPERTS - 1)\n            next_d_p",
    ),
    "row grad: V's scale dropped": (BACKWARD, "(weight * scale)[:, None]", "weight[:, None]"),
    "row grad: p's sum of one block": (
        BACKWARD,
        "d_p[expert] + tl.sum(d_fusion * activation, 1),)\n            d_z",
        "tl.sum(d_fusion * activation, 1),)\n            d_z",
    ),
    "row grad: split ignored": (BACKWARD, "partial_rows = split.to(tl.int64) * tokens + rows", "partial_rows = rows"),
    "v grad: split end ignored": (BACKWARD, "tl.minimum((split + 1) * columns, d)", "d"),
    "v grad: weight dropped": (BACKWARD, "d_v[index] * weight[:, None]", "d_v[index] * scale"),
    "v grad: first expert's V for all": (BACKWARD, "v_tiles[index], b_tile", "v_tiles[0], b_tile"),
    "v grad: an expert past the last": (
        BACKWARD,
        "there = of_expert(row_mask, expert, NUM_EXPERTS)\n        weight",
        "there = of_expert(row_mask, expert, NUM_EXPERTS + 1)\n        weight",
    ),
    "b grad: weight dropped": (BACKWARD, "(v_tile.to(tl.float32) * weight[:, None])", "v_tile"),
    "b grad: scale dropped": (BACKWARD, "d_b[index] * scale", "d_b[index]"),
    "b grad: bias's weight dropped": (BACKWARD, "tl.sum(d_z * weight[None, :], 1)", "tl.sum(d_z, 1)"),
    "sum of parts: one part": (SUM, "range(parts)", "range(1)"),
    "sum of parts: column past the last": (SUM, "(column < columns)", "(column <= columns)"),
    "router backward: zeros beside the logits left out": (
        ROUTER,
        "mask=row_mask[:, None] & (beyond < columns)",
        "mask=row_mask[:, None] & (beyond < 0)",
    ),
    "sum of parts: first block of the second left out": (SUM, "(program >= 0) &", "(program > 0) &"),
    "sum of parts: first block of the third left out": (SUM, "if program >= 0:", "if program > 0:"),
    "sum of parts: one row of blocks": (SUM, "(program // blocks)", "(program % 1)"),
    "h's gradient: the logits' columns shifted": (BACKEND, "d_rows[:, low_rank:]", "d_rows[:, low_rank - 1 : -1]"),
    "b grad: token mask of the tail dropped": (BACKWARD, "row_mask = rows < end\n", "row_mask = rows < end + 1\n"),
    "b grad: bias sum of one block": (BACKWARD, "(d_bias[index] + tl.sum(", "(tl.sum("),
    "b grad: bias dropped": (
        BACKWARD,
        "load_expert_bias(lora_b_bias, expert, cols, of_expert(col_mask, expert, NUM_EXPERTS), d)[:, None]",
        "0",
    ),
    "router: noise counter": (ROUTER, "rows[:, None] * NUM_EXPERTS +", "rows[:, None] * 16 +"),
    "router: temperature dropped": (ROUTER, "softmax_rows(noisy / tau,", "softmax_rows(noisy,"),
    "router: logits in one chain of sums": (
        ROUTER,
        "add_block_product(logit, h, tl.trans(w), BLOCK_D)",
        'tl.dot(h, tl.trans(w), logit, input_precision="ieee")',
    ),
    "router: bias dropped": (ROUTER, "logit += tl.load(bias", "tl.load(bias"),
    "router: token mask ignored": (ROUTER, "counted = tl.load(token_mask", "tl.load(token_mask"),
    "router: given logits ignored": (
        ROUTER,
        "logit = tl.load(logits + offsets, mask=mask, other=0.0)\n    else",
        "logit = tl.zeros((BLOCK_T, PADDED_EXPERTS), tl.float32)\n    else",
    ),
    "projections: gradient of V dropped": (BACKEND, 'd_v = grads["given_v"] = ', "d_v = "),
    "projections: gradient of the logits dropped": (BACKEND, 'grads["given_logits"] = d_logits', "pass"),
    "projections: decoded": (BACKEND, "x.shape[0] <= MAX_DECODE_TOKENS and x.given_v is None", "x.shape[0] <= 64"),
    "token mean: second expert row": (ROUTER, "partial_sums + NUM_EXPERTS + offsets", "partial_sums + offsets"),
    "token mean: divided by all tokens": (ROUTER, "return tl.load(count).to(tl.float32)", "return 1.0 * 77"),
    "router backward: one partial sum": (ROUTER, "for _ in range(partials):", "for _ in range(1):"),
    "router backward: tau dropped": (ROUTER, "tl.sum(d_p * p, 1)[:, None]) / tau", "tl.sum(d_p * p, 1)[:, None])"),
    "router backward: q's term dropped": (
        ROUTER,
        "d_logit += tl.where(counted, q *",
        "tl.where(counted, q *",
    ),
    "router backward: a token that doesn't count": (ROUTER, "tl.where(counted, d_logit, 0.0)", "d_logit"),
    "router weight grad: rounded": (
        BACKEND,
        "router_weight_grad(launch, x, d_logits,",
        "router_weight_grad(launch, x, d_logits.to(x.compute_dtype),",
    ),
    "router weight grad: last bits dropped": (
        ROUTER_WEIGHT,
        "d_weight = tl.dot(tl.trans(middle), h, d_weight)",
        "d_weight = d_weight",
    ),
    "router weight grad: tokens of the next split": (ROUTER_WEIGHT, "rows < end)[:, None]", "rows < end + 1)[:, None]"),
    "router weight grad: split end ignored": (
        ROUTER_WEIGHT,
        "tl.minimum((split + 1) * tokens_per_split, tokens)",
        "tokens",
    ),
    "router weight grad: rows without a gradient read": (
        ROUTER_WEIGHT,
        "mask=has_gradient[:, None] & col_mask",
        "mask=(rows < end)[:, None] & col_mask",
    ),
    "router weight grad: column past the last": (
        ROUTER_WEIGHT,
        "col_mask = (cols < d)[None, :]",
        "col_mask = (cols <= d)[None, :]",
    ),
    "decode: a token that doesn't count": (
        DECODE,
        "tl.sum(tl.where(counted[:, None], used, 0.0), 0)",
        "tl.sum(tl.where(counted, 1.0, 0.0)[:, None] * used, 0)",
    ),
    "decode: last split dropped": (DECODE, "tl.static_range(SPLITS)", "tl.static_range(SPLITS - 1)"),
    "decode: products of a wider type": (
        DECODE,
        '"COMPUTE": COMPUTE_NAMES[x.compute_dtype]',
        '"COMPUTE": "fp32"',
    ),
    "decode: logits in one chain of sums": (DECODE, ", BLOCK_SUMS=True", ""),
    "decode: router columns misplaced": (DECODE, "first = low_rank\n", "first = low_rank - 1\n"),
    "decode: token row past the last": (DECODE, "row_mask = rows < tokens\n", "row_mask = rows <= tokens\n"),
    "decode: column past the last": (DECODE, "col_mask = cols < d\n", "col_mask = cols <= d\n"),
    "decode: shared bias dropped": (DECODE, "s += tl.load(shared_bias", "tl.load(shared_bias"),
    "decode: router bias dropped": (DECODE, "logit += tl.load(router_bias", "tl.load(router_bias"),
    "decode: temperature dropped": (DECODE, "softmax_rows(noisy / tau,", "softmax_rows(noisy,"),
    "decode: explicit noise dropped": (DECODE, "noisy += tl.load(gumbel", "tl.load(gumbel"),
    "decode: token mask ignored": (DECODE, "counted = tl.load(token_mask", "tl.load(token_mask"),
    "decode: load of the soft p": (DECODE, "counted[:, None], used, 0.0)", "counted[:, None], p, 0.0)"),
    "decode: balance of load alone": (DECODE, "tl.sum(mean_p * mean_q, 0)", "tl.sum(mean_p, 0)"),
    "decode: output of the soft p": (DECODE, "== expert, used, 0.0)", "== expert, p, 0.0)"),
    "decode: A's bias dropped": (DECODE, "u += tl.load(lora_a_bias", "tl.load(lora_a_bias"),
    "decode: N's bias dropped": (DECODE, "v += tl.load(lora_n_bias", "tl.load(lora_n_bias"),
    "decode: N not transposed": (
        DECODE,
        "tl.trans(as_compute(n, COMPUTE)), v,",
        "as_compute(n, COMPUTE), v,",
    ),
    "decode: scale dropped": (DECODE, "a = z * (scale * silu_unit(SIGMOID))", "a = z * silu_unit(SIGMOID)"),
    "decode: runs where gradients follow": (BACKEND, "not x.needs_grad and few", "few"),
    "norm: statistics of a padded block": (NORM, "centred = tl.where(col_mask[None, :], x -", "centred = (x -"),
    "norm: block means not combined": (NORM, "mean += step * share\n", "mean = block_mean\n"),
    "norm: spread of the block means dropped": (NORM, " + step * step * share * start", ""),
    "norm: eps dropped": (NORM, "squares / d + eps", "squares / d"),
    "norm: one rounding where Llama has two": (NORM, ".to(hidden_in.dtype.element_ty).to(tl.float32) *", " *"),
    "norm: bias dropped": (NORM, "h += tl.load(norm_bias", "tl.load(norm_bias"),
    "norm: written by no column block": (
        NORM,
        "if column_block == 0:\n            tl",
        "if column_block == 1:\n            tl",
    ),
    "norm: logits in V's columns": (NORM, "(columns < LOW_RANK)[None, :]", "(columns <= LOW_RANK)[None, :]"),
    "norm: column past the last": (NORM, "        col_mask = cols < d\n", "        col_mask = cols <= d\n"),
    "norm backward: mean of the product dropped": (NORM, "(tl.sum(c * normalised, 0) / d)", "0.0"),
    "norm backward: mean dropped": (NORM, "inner -= tl.sum(c, 0) / d", "inner -= 0.0"),
    "norm backward: weight's gradient of one row": (NORM, "d_weight += g * normalised", "d_weight = g * normalised"),
    "norm backward: bias's gradient of one row": (NORM, "d_bias += g\n", "d_bias = g\n"),
    "norm backward: rows of the next program": (
        NORM,
        "first + rows_per_program, tokens)",
        "first + rows_per_program + 1, tokens)",
    ),
    "norm backward: the logits' gradient rounded": (
        NORM_BACKEND,
        "router_weight_grad(launch, x, grad_logits,",
        "router_weight_grad(launch, x, grad_logits.to(x.compute_dtype),",
    ),
    "norm backward: V's gradient dropped": (NORM_BACKEND, "d_rows[:, :low_rank] = upstream.v", "pass"),
}
# what runs for a file's faults: tests in guarded memory first, since elsewhere a stray write may end the process
FUSION_TESTS = (["test_modulation.py", "-k", "memory"], ["test_kernels.py"], ["test_modulation.py"])
PRODUCT_TESTS = (
    ["test_product_forward.py", "-k", "memory"],
    ["test_kernels.py", "-k", "product"],
    ["test_product_forward.py"],
)
DECODE_TESTS = (["test_decode.py", "-k", "memory"], ["test_decode.py"])
NORM_TESTS = (["test_norm_projection.py", "-k", "memory"], ["test_norm_projection.py"])
TESTS = {
    PRODUCT: PRODUCT_TESTS,
    SHARED: (*PRODUCT_TESTS[:2], *FUSION_TESTS),
    DECODE: DECODE_TESTS,
    BACKEND: (*DECODE_TESTS, *FUSION_TESTS),
    NORM: NORM_TESTS,
    NORM_BACKEND: NORM_TESTS,
}


def test_each_fault_changes_code_that_is_there():
    for name, (path, code, fault) in FAULTS.items():
        assert code in (ROOT / path).read_text(), name
        assert code != fault, name


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_a_test(name, tmp_path):
    shutil.copytree(ROOT / "hycam_kernels", tmp_path / "hycam_kernels")
    shutil.copytree(ROOT / "tests" / "kernels", tmp_path / "tests" / "kernels")
    for file in ("tests/__init__.py", "tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    path, code, fault = FAULTS[name]
    source = (tmp_path / path).read_text()
    (tmp_path / path).write_text(source.replace(code, fault))
    for tests in TESTS.get(path, FUSION_TESTS):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests],
            cwd=tmp_path / "tests" / "kernels" / "backends" / "triton",
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        if done.returncode:
            break
    assert done.returncode == 1, done.stdout[-2000:]
    assert "1 failed" in done.stdout
