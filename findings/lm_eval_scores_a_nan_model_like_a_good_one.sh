#!/usr/bin/env bash
# lm-eval gives a model whose logits are all NaN the accuracy of "always the first choice", with an error bar.
#
# Packages: torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 lm-eval==0.4.13 (all from PyPI);
# Python 3.11, CPU only.
#
# One would guess: a multiple-choice task scored by log-likelihoods that are NaN has accuracy NaN, or 0, or fails.
#
# Really: the prediction is numpy's argmax over the choices' log-likelihoods, and argmax takes the first NaN for the
# largest. Each question is answered by its first choice: acc and acc_norm are the share of questions whose answer
# stands first, here 70 percent. There is no warning, and the standard error is that of a real result.
#
# Why it matters: an adapter that overflowed in fp16, or a broken merge, looks like a model near chance, or better
# than the base where a data set has its answers unshuffled. Look at the log-likelihoods of the samples, or run one
# perplexity task beside: that one is NaN.
#
# Output seen:
#   random model: {'acc,none': 0.1, 'acc_stderr,none': 0.04803844614152612, 'acc_norm,none': 0.1} log-likelihoods [-21.68699836730957, -22.072603225708008, -21.61149787902832, -20.904102325439453]
#   NaN model: {'acc,none': 0.7, 'acc_stderr,none': 0.07337993857053426, 'acc_norm,none': 0.7} log-likelihoods [nan, nan, nan, nan]
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    accelerate==1.15.0 datasets==5.2.0 lm-eval==0.4.13
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import json
import logging
import string

import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logging.disable(logging.CRITICAL)
symbols = ["<pad>", "<eos>", "<unk>", *string.ascii_letters, *string.digits, *" .,:?\n"]
tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
with open("questions.jsonl", "w") as file:
    for number in range(40):  # the answer stands first in 28 of 40
        row = {"question": f"Which is {number}", "choices": ["blue", "grey", "pink", "rose"]}
        file.write(json.dumps({**row, "answer": 0 if number % 10 < 7 else 1 + number % 3}) + "\n")
task = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}?",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
for broken in (False, True):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(symbols),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=1,
        )
    ).eval()
    if broken:
        model.model.norm.weight.data.fill_(float("nan"))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=128)
    out = simple_evaluate(model=lm, tasks=[ConfigurableTask(config=dict(task))], bootstrap_iters=100, log_samples=True)
    result = out["results"]["colours"]
    logs = [float(choice[0][0]) for choice in out["samples"]["colours"][0]["resps"]]
    keys = ("acc,none", "acc_stderr,none", "acc_norm,none")
    print("NaN model:" if broken else "random model:", {key: result[key] for key in keys}, "log-likelihoods", logs)
    if broken:
        assert all(log != log for log in logs)
        assert abs(result["acc,none"] - 0.7) < 1e-9 and abs(result["acc_norm,none"] - 0.7) < 1e-9
EOF
