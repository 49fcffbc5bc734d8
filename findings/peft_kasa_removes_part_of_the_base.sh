#!/usr/bin/env bash
# A fresh KaSA adapter is not a no-op, and with disable_adapter() the base stays changed.
#
# Packages: torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: LoraConfig(kasa_config=KasaConfig()) adds a LoRA with learnt singular values whose B starts at
# zero: the new model equals the base, and disable_adapter() gives the base back. PiSSA, which does change the base
# weight, at least adds up to the base at the start.
#
# Really: KaSA overwrites each target's weight by its SVD without the r smallest singular values, and nothing adds
# them back. The new model's logits differ from the base's before any step; disable_adapter() and unload() answer with
# the truncated weight; the base is gone for good from the model object.
#
# Why it matters: a DPO or KL reference taken with disable_adapter(), a "base" row of a table taken from the same
# object, and step 0 of a training curve are all of a damaged base. Measure the base before get_peft_model.
#
# Output seen:
#   LoRA: fresh differs by 0.0e+00, disabled by 0.0e+00; rank after unload 64 of 64
#   PiSSA: fresh differs by 2.1e-07, disabled by 3.8e-01; rank after unload 56 of 64
#   KaSA: fresh differs by 2.4e-02, disabled by 2.4e-02; rank after unload 56 of 64
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
from peft import KasaConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=ids).logits


def rank(model):
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    return int((torch.linalg.svdvals(weight) > 1e-5).sum())


expected = logits(base())
for name, extra in {
    "LoRA": {},
    "PiSSA": dict(init_lora_weights="pissa"),
    "KaSA": dict(kasa_config=KasaConfig()),
}.items():
    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", r=8, **extra)).eval()
    fresh = (logits(model) - expected).abs().max().item()
    with model.disable_adapter():
        disabled = (logits(model) - expected).abs().max().item()
    left = rank(model.unload())
    print(f"{name}: fresh differs by {fresh:.1e}, disabled by {disabled:.1e}; rank after unload {left} of 64")
    if name == "KaSA":
        assert fresh > 1e-3 and disabled > 1e-3 and left == 56
    else:
        assert fresh < 1e-5
EOF
