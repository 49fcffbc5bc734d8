#!/usr/bin/env bash
# A Lily adapter's logits for one prompt change with its batch neighbours, its padding and its later tokens.
#
# Packages: torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: Lily routes each token to a mixture of its B experts (its router's output has an entry for each of
# them), so a row of a batch doesn't see the other rows, and a token of a causal model doesn't see later ones.
#
# Really: the router's probabilities are averaged over every token of the batch, padding included, and the one mean
# mixes the experts for all. A row's logits move with the other rows; the logits at position 3 move when only the
# token at position 11 does; the same step of greedy decoding gives other logits with the KV cache (where the mean is
# of the new tokens alone) than without it. LoRA on the same model: none of it.
#
# Why it matters: a loss over whole sequences is computed with a leak of future tokens that generation doesn't have,
# so perplexity and generated text are of two different functions; scores depend on the batch size and the order of an
# evaluation.
#
# Output seen:
#   LoraConfig {'neighbour': '0.0e+00', 'later token': '0.0e+00', 'padding': '1.5e-07', 'cache': '8.9e-08'}
#   LilyConfig {'neighbour': '9.5e-02', 'later token': '2.7e-02', 'padding': '3.7e-02', 'cache': '3.6e-02'}
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
from peft import LilyConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def adapted(config):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )
    model = get_peft_model(base, config).eval()
    with torch.no_grad():  # as if trained
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def moved(model):
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    both = model(input_ids=ids).logits
    alone = model(input_ids=ids[:1]).logits
    later = ids.clone()
    later[:, 11] = (later[:, 11] + 1) % 64
    later = model(input_ids=later).logits
    padded = torch.nn.functional.pad(ids, (0, 4))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    padded = model(input_ids=padded, attention_mask=mask).logits[:, :12]
    keep = dict(max_new_tokens=2, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    keep |= dict(attention_mask=torch.ones_like(ids), eos_token_id=None)
    cached = model.generate(input_ids=ids, use_cache=True, **keep)
    whole = model.generate(input_ids=ids, use_cache=False, **keep)
    assert torch.equal(cached.sequences[:, :13], whole.sequences[:, :13])  # step 2 continues the same tokens
    return {
        "neighbour": (alone[0] - both[0]).abs().max().item(),
        "later token": (later[:, 3] - both[:, 3]).abs().max().item(),
        "padding": (padded - both).abs().max().item(),
        "cache": (cached.logits[1] - whole.logits[1]).abs().max().item(),
    }


for config in (LoraConfig(task_type="CAUSAL_LM"), LilyConfig(task_type="CAUSAL_LM")):
    result = moved(adapted(config))
    print(type(config).__name__, {name: f"{value:.1e}" for name, value in result.items()})
    if isinstance(config, LoraConfig):
        assert max(result.values()) < 1e-5
    else:
        assert min(result.values()) > 1e-4
EOF
