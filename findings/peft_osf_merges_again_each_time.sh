#!/usr/bin/env bash
# OSF adds its update again at every merge, can't be unmerged, and disable_adapter() then still has it.
#
# Packages: torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: merge_adapter() is idempotent (a second call warns "already merged" and does nothing),
# merge_and_unload() after it only unwraps, and disable_adapter() gives the base model, merged or not: so it is with
# LoRA.
#
# Really: OSF's merge doesn't look whether it has merged. merge_adapter() and then merge_and_unload(), as when one
# evaluates a merged model and then exports it, exports base + 2 x update; under disable_adapter() a merged OSF model
# answers with the update; unmerge_adapter() raises NotImplementedError. No warning from the first two.
#
# Why it matters: the exported model isn't the one that was evaluated, and a KL or DPO reference taken with
# disable_adapter() is the tuned model. Merge OSF once, on a model that is loaded for it.
#
# Output seen:
#   LORA: 1.000 x the update exported; disabled differs from base by 1.5e-07
#     unmerge: ok
#   OSF: 2.000 x the update exported; disabled differs from base by 2.2e-03
#     unmerge: NotImplementedError: OSF models do not support unmerging
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
from peft import LoraConfig, OSFConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def weight(model):
    return model.get_submodule("model.layers.0.self_attn.q_proj").weight.detach().clone()


@torch.no_grad()
def check(config):
    plain, plain_logits = weight(base()), base()(input_ids=ids).logits

    def trained():
        model = get_peft_model(base(), config).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model

    once = weight(trained().merge_and_unload()) - plain
    model = trained()
    model.merge_adapter()
    twice = weight(model.merge_and_unload()) - plain
    model = trained()
    model.merge_adapter()
    with model.disable_adapter():
        off = (model(input_ids=ids).logits - plain_logits).abs().max().item()
    try:
        model.unmerge_adapter()
        unmerge = "ok"
    except NotImplementedError as error:
        unmerge = f"NotImplementedError: {error}"
    factor = ((twice * once).sum() / (once * once).sum()).item()
    print(f"{config.peft_type.value}: {factor:.3f} x the update exported; disabled differs from base by {off:.1e}")
    print(f"  unmerge: {unmerge}")
    return factor, off, unmerge


factor, off, unmerge = check(LoraConfig(task_type="CAUSAL_LM"))
assert abs(factor - 1) < 1e-3 and off < 1e-5 and unmerge == "ok"
factor, off, unmerge = check(OSFConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
assert abs(factor - 2) < 1e-3 and off > 1e-4 and unmerge.startswith("NotImplementedError")
EOF
