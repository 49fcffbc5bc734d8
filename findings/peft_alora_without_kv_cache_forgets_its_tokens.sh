#!/usr/bin/env bash
# Without a KV cache, generation with an activated LoRA switches the adapter off token by token.
#
# Packages: torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: use_cache=False is slower but decodes the same: an activated LoRA (alora_invocation_tokens) applies
# from its invocation tokens on, with and without a cache.
#
# Really: generate() works out once how many positions before the end of the prompt the invocation starts, and each
# forward adapts that many positions counted from the end of what it is given. With a cache that is right. Without one
# the sequence grows and the window doesn't: after n new tokens the first n tokens from the invocation on are computed
# by the base model again. From the second step on the logits are not the model's; a forward over the finished text
# agrees with the cached run only. A LoRA agrees in all three.
#
# Why it matters: models or settings without a cache (gradient checkpointing left on turns it off, as do some remote
# models) give other text for the same aLoRA, without a warning.
#
# Output seen:
#   LoRA, use_cache=True: error of each step ['9e-08', '1e-07', '1e-07', '1e-07', '9e-08', '1e-07']
#   LoRA, use_cache=False: error of each step ['9e-08', '2e-07', '1e-07', '9e-08', '7e-08', '9e-08']
#   aLoRA, use_cache=True: error of each step ['1e-07', '1e-07', '1e-07', '1e-07', '1e-07', '2e-07']
#   aLoRA, use_cache=False: error of each step ['1e-07', '3e-01', '3e-01', '3e-01', '2e-01', '3e-01']
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

prompt = torch.tensor([[9, 3, 17, 5, 6, 40, 2, 11]])  # 5 6 invokes
for name, extra in {"LoRA": {}, "aLoRA": dict(alora_invocation_tokens=[5, 6])}.items():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=32, **extra)).eval()
    with torch.no_grad():  # as if trained
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    # every step gets the same forced token, so that the two runs see the same text
    force = lambda batch, ids: [20 + ids.shape[-1]]
    steps = {}
    for cache in (True, False):
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            use_cache=cache,
            max_new_tokens=6,
            do_sample=False,
            prefix_allowed_tokens_fn=force,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            eos_token_id=None,
        )
        steps[cache] = torch.stack(out.logits, 1)[0]
    with torch.no_grad():
        whole = model(input_ids=out.sequences).logits[0, prompt.shape[1] - 1 : -1]
    errors = {
        cache: [(step - true).abs().max().item() for step, true in zip(steps[cache], whole)] for cache in steps
    }
    for cache in (True, False):
        print(f"{name}, use_cache={cache}: error of each step", [f"{error:.0e}" for error in errors[cache]])
    assert max(errors[True]) < 1e-5 and errors[False][0] < 1e-5
    assert max(errors[False]) < 1e-5 if name == "LoRA" else min(errors[False][1:]) > 1e-3
EOF
