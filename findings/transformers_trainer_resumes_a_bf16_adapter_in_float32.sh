#!/usr/bin/env bash
# Trainer goes on with a bfloat16 PEFT adapter in float32: same run, other dtype from the checkpoint on.
#
# Packages: torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: a run that is stopped and resumed trains the model that it was given, an adapter that
# get_peft_model(..., autocast_adapter_dtype=False) made in bfloat16 among it, and ends where the whole run ends.
#
# Really: to resume, Trainer (and load_best_model_at_end) calls PeftModel.load_adapter, whose autocast_adapter_dtype is
# True by default: the adapter gets new parameters, in float32. Nothing says so. What follows is trained and
# saved in float32, at twice the bytes, and no resumed run repeats the whole one.
#
# Why it matters: bfloat16 adapters are made to save memory or to meet FSDP's one dtype; after a restart the optimizer
# holds twice as much, FSDP gets mixed dtypes, and steps that bfloat16 rounds away begin to count.
#
# Output seen:
#   whole run: bfloat16 before, bfloat16 after; its last checkpoint bfloat16
#   first half: bfloat16 before, bfloat16 after; its last checkpoint bfloat16
#   resumed: bfloat16 before, float32 after; its last checkpoint float32
#   largest difference of a weight: 1.5e-03
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2 \
    accelerate==1.15.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

generator = torch.Generator().manual_seed(0)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (64, 16), generator=generator)]


def dtypes(tensors):
    (dtype,) = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    return dtype


def train(name, folder, steps, checkpoint=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(LlamaForCausalLM(config).to(torch.bfloat16), lora, autocast_adapter_dtype=False)
    before = dtypes(parameter for parameter in model.parameters() if parameter.requires_grad)
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", log_level="error",
    )
    Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=checkpoint)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = dtypes(load_file(f"{folder}/checkpoint-{steps}/adapter_model.safetensors").values())
    print(f"{name}: {before} before, {dtypes(trained)} after; its last checkpoint {saved}")
    assert before == "bfloat16" and dtypes(trained) == saved == ("float32" if checkpoint else "bfloat16")
    return [parameter.detach().float() for parameter in trained]


whole = train("whole run", "whole", 8)
train("first half", "parts", 4)
resumed = train("resumed", "parts", 8, "parts/checkpoint-4")
largest = max((a - b).abs().max().item() for a, b in zip(whole, resumed))
print(f"largest difference of a weight: {largest:.1e}")
assert largest > 1e-4
EOF
