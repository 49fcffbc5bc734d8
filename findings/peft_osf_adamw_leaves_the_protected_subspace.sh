#!/usr/bin/env bash
# OSF protects the top singular directions of a weight under SGD only; under AdamW the update goes into them.
#
# Packages: torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: OSF (Orthogonal Subspace Fine-tuning) projects the gradients of its low singular directions to be
# orthogonal to the frozen high ones, so an update never touches what the high directions hold: its cure against
# forgetting.
#
# Really: the gradient is projected, the step is not. AdamW divides each number of the gradient by its own scale and
# decays weights, and what results is no longer orthogonal. After 50 steps SGD's update has a part of about 1e-6 in
# the protected output directions; AdamW's, which is what everybody trains with, has 10 to 30 percent of its norm
# there, from a projected gradient at every step.
#
# Why it matters: a comparison of forgetting that trains OSF with AdamW doesn't measure OSF. Project the factors after
# each optimiser step, or use SGD.
#
# Output seen:
#   SGD: in protected directions 1.5e-06 of the update, at most 4e-07 of a gradient
#   AdamW: in protected directions 1.9e-01 of the update, at most 4e-07 of a gradient
#   AdamW, no decay: in protected directions 1.9e-01 of the update, at most 4e-07 of a gradient
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import torch
from peft import OSFConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
share = {}
for name, make in {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=1.0),
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=1e-3),
    "AdamW, no decay": lambda weights: torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0),
}.items():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )
    model = get_peft_model(base, OSFConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    left, _, right = torch.linalg.svd(layer.base_layer.weight.detach())
    low = layer.osf_svd_params["default"]["S_low"].numel()
    left, right = left[:, : 64 - low], right[: 64 - low]  # what OSF freezes
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    worst = 0.0
    for _ in range(50):
        model(input_ids=ids, labels=ids).loss.backward()
        gradient = layer.osf_svd_params["default"]["U_low"].grad
        worst = max(worst, ((left.T @ gradient).norm() / gradient.norm()).item())
        optimizer.step()
        optimizer.zero_grad()
    delta = layer.get_delta_weight("default").detach()
    share[name] = ((left.T @ delta).norm() / delta.norm()).item()
    print(f"{name}: in protected directions {share[name]:.1e} of the update, at most {worst:.0e} of a gradient")
    assert worst < 1e-4
assert share["SGD"] < 1e-4 and share["AdamW"] > 0.05 and share["AdamW, no decay"] > 0.05
EOF
