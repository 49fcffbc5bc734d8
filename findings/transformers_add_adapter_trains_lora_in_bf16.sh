#!/usr/bin/env bash
# model.add_adapter(LoraConfig) on a bf16 model makes bf16 LoRA weights, where get_peft_model makes float32 ones.
#
# Packages: torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: transformers' add_adapter and PEFT's get_peft_model build the same adapter from the same config;
# PEFT trains adapters of bf16 models in float32.
#
# Really: autocast_adapter_dtype is a setting of PeftModel. add_adapter injects the layers without it, and the LoRA
# matrices get the base's bf16. B starts at zero and still learns, but A starts at numbers whose bf16 neighbours are
# further away than a step: over 50 steps of AdamW at lr 1e-5 most of A's numbers never change, where in float32 each
# one does. load_adapter keeps bf16 too, and a float32 file of an adapter is rounded as it is read.
#
# Why it matters: since transformers 5 checkpoints load in their own dtype, mostly bf16, so the two documented ways to
# add a LoRA train two different things at the same learning rate. Cast the adapter to float32 after add_adapter.
#
# Output seen:
#   load_adapter of a float32 file: {'torch.bfloat16'}
#   get_peft_model: {'torch.float32'}, 100 % of A changed
#   add_adapter: {'torch.bfloat16'}, 3 % of A changed
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def lora(model):
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
models = {"get_peft_model": get_peft_model(base(), config), "add_adapter": base()}
models["add_adapter"].add_adapter(config)
with tempfile.TemporaryDirectory() as folder:
    models["get_peft_model"].save_pretrained(folder)
    loaded = base()
    loaded.load_adapter(folder)
    print("load_adapter of a float32 file:", {str(weight.dtype) for weight in lora(loaded).values()})
    assert {weight.dtype for weight in lora(loaded).values()} == {torch.bfloat16}

for way, model in models.items():
    weights = lora(model)
    assert all(weight.requires_grad for weight in weights.values())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-5, weight_decay=0.0)
    for _ in range(50):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    names = [name for name in weights if "lora_A" in name]
    changed = sum((weights[name] != before[name]).sum().item() for name in names)
    total = sum(weights[name].numel() for name in names)
    dtype = {str(weight.dtype) for weight in weights.values()}
    print(f"{way}: {dtype}, {100 * changed / total:.0f} % of A changed")
    if way == "add_adapter":
        assert dtype == {"torch.bfloat16"} and changed < 0.4 * total
    else:
        assert dtype == {"torch.float32"} and changed > 0.95 * total
EOF
