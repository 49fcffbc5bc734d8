#!/usr/bin/env bash
# With longrope or dynamic rope a short prompt's logits depend on the longest row of its batch, and greedy text with a
# KV cache is not the text without it.
#
# Packages: torch==2.13.0 transformers==5.23.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: rotary angles depend on a token's position, so with right padding and a mask a row of a batch gives
# the logits that it gives alone, as with default, linear, llama3 or yarn rope; and a KV cache only saves time.
#
# Really: "longrope" (Phi 3 128k, Phi 4 mini) and "dynamic" choose their frequencies in each forward by the largest
# position of the whole batch. One row longer than original_max_position_embeddings switches every row to the long
# factors. And when a generation crosses that length, keys in the cache keep the old frequencies while queries get the
# new ones: from that step on logits differ from those of a forward over the same tokens. No warning. Yarn on the same
# model: neither.
#
# Why it matters: scores of an evaluation change with batch size and with sorting by length, for the base and for
# every adapter on it; the loss in training has one function for short batches and another for long ones.
#
# Output seen:
#   yarn: alone and beside a row of 24 tokens differ by 1.8e-07; cached and whole forward differ by 2.8e-07 up to 16 tokens, by 3.3e-07 beyond
#   dynamic: alone and beside a row of 24 tokens differ by 3.5e-02; cached and whole forward differ by 2.1e-07 up to 16 tokens, by 5.6e-02 beyond
#   longrope: alone and beside a row of 24 tokens differ by 3.3e-01; cached and whole forward differ by 2.2e-07 up to 16 tokens, by 6.1e-01 beyond
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))
prompt = ids[:1, :10]
mask = torch.ones_like(ids)
mask[0, 10:] = 0
limit = 16
ropes = {
    "yarn": dict(factor=4.0, original_max_position_embeddings=limit),
    "dynamic": dict(factor=4.0),
    "longrope": dict(
        short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0, original_max_position_embeddings=limit
    ),
}
for name, rope in ropes.items():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=limit if name == "dynamic" else 4 * limit,
            rope_parameters={"rope_type": name, "rope_theta": 1e4, **rope},
        )
    ).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "q_proj" in key or "k_proj" in key:
                parameter.mul_(10)  # attention that isn't flat, as in a trained model
        alone = model(prompt).logits[0]
        batched = model(ids, attention_mask=mask).logits[0, :10]
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        # what each step's logits are without a cache
        errors = [
            (step[0] - model(out.sequences[:, : 10 + n]).logits[0, -1]).abs().max().item()
            for n, step in enumerate(out.logits)
        ]
    row = (alone - batched).abs().max().item()
    short, long = max(errors[: limit - 10]), max(errors[limit - 10 + 1 :])
    print(
        f"{name}: alone and beside a row of 24 tokens differ by {row:.1e}; cached and whole forward differ "
        f"by {short:.1e} up to {limit} tokens, by {long:.1e} beyond"
    )
    assert short < 1e-4
    if name == "yarn":
        assert row < 1e-4 and long < 1e-4
    else:
        assert row > 1e-2 and long > 1e-2
EOF
