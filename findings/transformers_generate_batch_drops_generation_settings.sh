#!/usr/bin/env bash
# generate_batch (continuous batching) silently ignores generation settings, and returns empty answers for others.
#
# Packages: torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: model.generate_batch(prompts, generation_config=...) gives what generate gives for each prompt, or
# raises an error that names what it doesn't support.
#
# Really: greedy decoding agrees. But min_new_tokens and num_beams are ignored without a word; repetition_penalty is
# dropped (a line of the log says so); and with no_repeat_ngram_size the worker thread dies with an IndexError in the
# log while the call returns normally, with an empty list of tokens for each request.
#
# Why it matters: moving an evaluation to the faster call, with a generation_config that a model ships, changes the
# text; and empty answers score 0 on BLEU or exact match instead of stopping the run. Check each output's error and
# status, and compare a sample with generate.
#
# Output seen:
#   greedy: equal
#   min_new_tokens: generate honours it: True; generate_batch: as if not set
#   num_beams: generate honours it: True; generate_batch: as if not set
#   repetition_penalty: generate honours it: True; generate_batch: as if not set
#   no_repeat_ngram_size: generate honours it: True; generate_batch: all empty
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    accelerate==1.15.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import logging

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.mul_(5)
generator = torch.Generator().manual_seed(0)
cache = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # or it takes most of the memory
prompts = [torch.randint(1, 64, (n,), generator=generator).tolist() for n in (5, 9, 12)]


def answers(**settings):
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, **settings)
    one_by_one = [
        model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)).long(), generation_config=config)
        for p in prompts
    ]
    one_by_one = [out[0, len(p) :].tolist() for out, p in zip(one_by_one, prompts)]
    batch = model.generate_batch(prompts, generation_config=config, continuous_batching_config=cache, progress_bar=False)
    return one_by_one, [out.generated_tokens for out in batch.values()]


plain, greedy = answers(eos_token_id=None)
assert plain == greedy
stop = plain[2][2]  # a token that ends the third answer early
plain, greedy = answers(eos_token_id=stop)
assert plain == greedy and len(greedy[2]) == 3
print("greedy: equal")
for name, settings in {
    "min_new_tokens": dict(min_new_tokens=6),
    "num_beams": dict(num_beams=2),
    "repetition_penalty": dict(repetition_penalty=5.0),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=1),
}.items():
    want, got = answers(eos_token_id=stop, **settings)
    kind = "as if not set" if got == greedy else "all empty" if got == [[], [], []] else "other"
    print(f"{name}: generate honours it: {want != greedy}; generate_batch: {kind}")
    assert want != greedy
    assert kind == ("all empty" if name == "no_repeat_ngram_size" else "as if not set")
EOF
