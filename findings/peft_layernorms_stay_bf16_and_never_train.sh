#!/usr/bin/env bash
# On a bf16 model PEFT trains norms (LN_TUNING, modules_to_save) in bf16, where usual steps round to nothing.
#
# Packages: torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: get_peft_model(..., autocast_adapter_dtype=True), the default, keeps what is trained beside a
# 16-bit model in float32.
#
# Really: it does so for LoRA matrices, but the copies that LN_TUNING and modules_to_save train keep the base's
# bfloat16. A norm's weight starts at 1.0, whose bf16 neighbours are 0.0039 and 0.0078 away: 100 steps of AdamW at lr
# 1e-3 change none of LN_TUNING's 320 numbers and the loss stays the same bit for bit. Gradients are there; nothing
# warns. In float32 all 320 change.
#
# Why it matters: "norms too" looks like a harmless addition to a bf16 adapter run, and the checkpoint has the norms,
# but they are what they were at the start. Cast them to float32 by hand before the optimiser is made.
#
# Output seen:
#   {'self_attn.q_proj.lora_A.default.weight': torch.float32, 'self_attn.q_proj.lora_B.default.weight': torch.float32, 'model.norm.modules_to_save.default.weight': torch.bfloat16}
#   torch.float32: 320 of 320 numbers changed, loss 4.1712 -> 4.1424
#   torch.bfloat16: 0 of 320 numbers changed, loss 4.1711 -> 4.1711
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
from peft import LNTuningConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def base(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).to(dtype)


lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["norm"])
dtypes = {
    name.split(".layers.0.")[-1].replace("base_model.model.", ""): parameter.dtype
    for name, parameter in get_peft_model(base(torch.bfloat16), lora).named_parameters()
    if parameter.requires_grad and ("layers.0.self" in name or "model.norm" in name)
}
print(dtypes)
assert {str(dtype) for name, dtype in dtypes.items() if "lora" in name} == {"torch.float32"}
assert {str(dtype) for name, dtype in dtypes.items() if "lora" not in name} == {"torch.bfloat16"}

ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
for dtype in (torch.float32, torch.bfloat16):
    model = get_peft_model(base(dtype), LNTuningConfig(task_type="CAUSAL_LM"))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    losses = []
    for _ in range(100):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(weight.grad.abs().sum() > 0 for weight in weights)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    changed = sum((weight != old).sum().item() for weight, old in zip(weights, before))
    total = sum(weight.numel() for weight in weights)
    print(f"{dtype}: {changed} of {total} numbers changed, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    if dtype == torch.bfloat16:
        assert changed == 0 and losses[0] == losses[-1] and total == 320
    else:
        assert changed == total and losses[-1] < losses[0]
EOF
