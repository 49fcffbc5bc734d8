#!/usr/bin/env bash
# PSOFT and FRoD adapters trained on a bf16 base are wrong on the same checkpoint in float32.
#
# Packages: torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: an adapter trained on a checkpoint read in bf16 works on that checkpoint read in float32, the
# precision of the base making a difference of bf16's size: so it is with LoRA, DoRA, OFT, OSF or HiRA.
#
# Really: PSOFT and FRoD store only small matrices that are meant between singular vectors of the base weight, and
# find these again at load. The singular vectors of a weight and of the same weight rounded to bf16 differ in sign and
# in order, so what was learnt meets other directions. Loading is silent, and the logits are off by a large part of
# all that the adapter does (PSOFT), or by more than that (FRoD, whose file holds part of the decomposition, which
# then doesn't fit the rest). On a base whose float32 weights are the bf16 ones all three agree.
#
# Why it matters: training in bf16 and evaluating or merging in float32, or on a quantised base, is usual. Keep the
# dtype of the base with such an adapter, and check it by its logits after loading. Signs of singular vectors also
# differ between LAPACK builds and devices.
#
# Output seen:
#   LORA: the adapter moves logits by 0.352; error on the bf16 weights as float32 0.003, on the float32 checkpoint 0.003
#   PSOFT: the adapter moves logits by 0.207; error on the bf16 weights as float32 0.003, on the float32 checkpoint 0.151
#   FROD: the adapter moves logits by 0.038; error on the bf16 weights as float32 0.006, on the float32 checkpoint 0.210
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import copy
import tempfile

import torch
from peft import FrodConfig, LoraConfig, PeftModel, PsoftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
checkpoint = LlamaForCausalLM(config).eval()  # float32
rounded = copy.deepcopy(checkpoint).to(torch.bfloat16)


@torch.no_grad()
def logits(model):
    return model(input_ids=ids).logits.float()


for method in (LoraConfig, PsoftConfig, FrodConfig):
    model = get_peft_model(copy.deepcopy(rounded), method(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as if trained
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trained = logits(model)
    effect = (trained - logits(rounded)).abs().max().item()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        upcast = logits(PeftModel.from_pretrained(copy.deepcopy(rounded).float(), folder).eval())
        float32 = logits(PeftModel.from_pretrained(copy.deepcopy(checkpoint), folder).eval())
    upcast, float32 = ((other - trained).abs().max().item() for other in (upcast, float32))
    print(
        f"{model.peft_config['default'].peft_type.value}: the adapter moves logits by {effect:.3f}; "
        f"error on the bf16 weights as float32 {upcast:.3f}, on the float32 checkpoint {float32:.3f}"
    )
    assert upcast < 0.02
    assert float32 < 0.02 if method is LoraConfig else float32 > 0.2 * effect
EOF
