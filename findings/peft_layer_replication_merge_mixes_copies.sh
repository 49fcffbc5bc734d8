#!/usr/bin/env bash
# With layer_replication, merging LoRA gives every copy of a layer the sum of all copies' updates.
#
# Packages: torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: LoraConfig(layer_replication=[(0, 2), (1, 3)]) repeats layers whose base weights are shared and
# gives each copy a LoRA of its own, so merge_and_unload() either gives each copy its own merged weight or refuses.
#
# Really: it merges in place into the weight that the copies share. Each copy ends with base + the sum of the updates
# of all its copies, not its own; logits are off by a good part of what the adapter does. No warning is given, and
# safe_merge=True, which checks for NaN only, does the same. Without replication the merged model is right.
#
# Why it matters: the exported "merged" model is another one than was trained. Give each copy its own weight before
# merging, or serve such an adapter unmerged; compare logits before and after.
#
# Output seen:
#   layer_replication=None: the adapter moves logits by 0.32, merging by 1.7e-07, with safe_merge by 1.7e-07
#   layer_replication=[(0, 2), (1, 3)]: the adapter moves logits by 0.36, merging by 1.9e-01, with safe_merge by 1.9e-01
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
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def trained(replication):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", layer_replication=replication)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=ids).logits


for replication in (None, [(0, 2), (1, 3)]):
    model = trained(replication)
    before = logits(model)
    with model.disable_adapter():
        effect = (before - logits(model)).abs().max().item()
    plain = (logits(trained(replication).merge_and_unload()) - before).abs().max().item()
    safe = (logits(trained(replication).merge_and_unload(safe_merge=True)) - before).abs().max().item()
    print(
        f"layer_replication={replication}: the adapter moves logits by {effect:.2f}, "
        f"merging by {plain:.1e}, with safe_merge by {safe:.1e}"
    )
    for error in (plain, safe):
        assert error < 1e-5 if replication is None else error > 0.1 * effect
EOF
