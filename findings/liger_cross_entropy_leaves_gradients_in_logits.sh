#!/usr/bin/env bash
# With Liger's cross entropy a float32 model returns gradients as outputs.logits, and zeros where labels are -100.
#
# Packages: torch==2.13.0 transformers==5.23.0 liger-kernel==0.8.5 triton==3.7.1 numpy==2.4.6 (all from PyPI); Python
# 3.11, CPU only.
#
# One would guess: apply_liger_kernel_to_llama(cross_entropy=True) computes the same loss with less memory;
# outputs.logits stay the model's logits, at the latest under no_grad, where there is no gradient to store, and
# whatever the model's dtype.
#
# Really: the kernel writes over its input in the forward pass: (softmax - one_hot) / n where gradients are wanted,
# and under no_grad still zeros at each ignored position, that is at the prompt's tokens and at each row's last, whose
# logits predict the continuation. transformers' loss upcasts by .float(), which copies bf16 logits but hands float32
# ones through, so the model's own output is overwritten. The loss is right. The same model in bf16, or called without
# labels, returns its logits.
#
# Why it matters: token accuracy, the entropy of the next token, and distillation from the forward that also gave the
# loss are wrong in float32 and right in bf16, with equal losses. Use fused_linear_cross_entropy, which returns no
# logits in training, or take metrics from a forward without labels. (Run here by triton's interpreter; the store is
# in the kernel's source.)
#
# Output seen:
#   float32, gradients False: same loss; logits off by 0.00 where there is a label, by 0.51 at the last token, which is zero
#   float32, gradients True: same loss; logits off by 0.57 where there is a label, by 0.51 at the last token, which is zero
#   bfloat16, gradients False: same loss; logits off by 0.00 where there is a label, by 0.00 at the last token, which is not zero
#   bfloat16, gradients True: same loss; logits off by 0.00 where there is a label, by 0.00 at the last token, which is not zero
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    liger-kernel==0.8.5 triton==3.7.1 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore TRITON_INTERPRET=1 TRITON_CACHE_DIR="$tmp/triton"
venv/bin/python - <<'EOF'
import copy

import torch
from liger_kernel.transformers import apply_liger_kernel_to_llama
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
).eval()
models = {"float32": model, "bfloat16": copy.deepcopy(model).to(torch.bfloat16)}
ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    plain = {dtype: model(input_ids=ids, labels=ids) for dtype, model in models.items()}
    unlabelled = {dtype: model(input_ids=ids).logits for dtype, model in models.items()}
apply_liger_kernel_to_llama(
    rope=False, rms_norm=False, swiglu=False, cross_entropy=True, fused_linear_cross_entropy=False
)
for dtype, model in models.items():
    assert torch.equal(plain[dtype].logits, unlabelled[dtype])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = model(input_ids=ids, labels=ids)
        assert abs(out.loss.item() - plain[dtype].loss.item()) < 1e-3
        off = (out.logits - plain[dtype].logits).abs().amax(-1).detach()
        labelled, last = off[:, :-1], out.logits[:, -1].detach()
        print(
            f"{dtype}, gradients {grad}: same loss; logits off by {labelled.max():.2f} where there is a label, "
            f"by {off[:, -1].max():.2f} at the last token, which is {'zero' if not last.any() else 'not zero'}"
        )
        if dtype == "bfloat16":
            assert off.max() == 0
        else:
            assert not last.any() and off[:, -1].min() > 0.1
            assert labelled.min() > 0.1 if grad else labelled.max() < 1e-5
EOF
