"""Without PEFT and without a trainer: python examples/by_hand.py --model NAME --output hycam.safetensors"""

import argparse

import torch
from rows import load_rows, tokenize
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from hycam import HyCAMAttention, HyCAMConfig, bind, router_statistics

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or folder")
parser.add_argument("--output", default="hycam.safetensors", help="file of the adapter's weights")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(options.model)
for layer in model.model.layers:
    layer.self_attn = HyCAMAttention(layer.self_attn, HyCAMConfig(r=16), hidden_size=model.config.hidden_size)
bind(model)  # freezes the rest; padding and the loss's scale reach the layers

trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
optimizer = torch.optim.AdamW(trained.values(), lr=2e-3)
collate = DataCollatorForSeq2Seq(tokenizer)
batches = DataLoader(tokenize(load_rows(), tokenizer), batch_size=8, shuffle=True, collate_fn=collate, drop_last=True)

model.train()
step = 0
while step < options.steps:
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()  # each layer adds the balance loss's gradient here
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            balance = torch.stack([layer.balance_loss for layer in router_statistics(model).values()]).mean()
            print(f"step {step}: loss {loss.item():.3f}, balance loss {balance.item():.3f}")
        if step == options.steps:
            break
save_file({name: parameter.detach().contiguous() for name, parameter in trained.items()}, options.output)
