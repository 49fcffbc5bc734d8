#!/usr/bin/env bash
# Trainer's data order of seed 43 is that of seed 42 one epoch on: neighbouring seeds share all orders but one.
#
# Packages: torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: runs with seeds 42, 43 and 44 see the data in unrelated orders, so their spread tells what the
# order of the data does.
#
# Really: Trainer's default sampler (accelerate's SeedableRandomSampler) seeds epoch e with seed + e. Seed 43's first
# epoch has the order of seed 42's second, seed 43's second that of seed 42's third, and so on: over 3 epochs, seeds
# 42 and 43 share two of three orders, 42 and 44 one. data_seed=43 gives the same sequence; seeds that are an epoch
# count apart share nothing.
#
# Why it matters: the spread over seeds 0, 1, 2, which papers report, understates that of the data order. Take seeds
# that are further apart than the epochs.
#
# Output seen:
#   seed 42: 681702ab4359 467298150ab3 45937186b0a2
#   seed 43: 467298150ab3 45937186b0a2 b630457a2189
#   seed 44: 45937186b0a2 b630457a2189 9540682731ba
#   seed 45: b630457a2189 9540682731ba 75b24368190a
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    accelerate==1.15.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

data = [{"input_ids": torch.tensor([i, i + 1, i + 2, i + 3]), "number": i} for i in range(12)]


def orders(epochs=3, **seeds):
    seen = []

    def collate(rows):
        seen.extend(row["number"] for row in rows)
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=4,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            **seeds,
        )
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
            )
        )
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [seen[epoch * 12 : (epoch + 1) * 12] for epoch in range(epochs)]


runs = {seed: orders(seed=seed) for seed in (42, 43, 44, 45)}
for seed, run in runs.items():
    print(f"seed {seed}:", *("".join(f"{number:x}" for number in epoch) for epoch in run))
assert runs[43][:2] == runs[42][1:] and runs[44][:1] == runs[42][2:]
assert not any(epoch in runs[42] for epoch in runs[45])
assert orders(seed=7, data_seed=43) == runs[43]
EOF
