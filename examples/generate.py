"""Answers of an adapted model: python examples/generate.py --model NAME --adapter adapter --prompt "How many ..." """

import argparse

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import hycam  # noqa: F401 (makes HyCAM known to PEFT)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or folder")
parser.add_argument("--adapter", default="adapter", help="the adapter's folder")
parser.add_argument("--prompt", default="How many grams are 21 kilograms?")
parser.add_argument("--max-new-tokens", type=int, default=20)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options.model), options.adapter).eval()
message = {"role": "user", "content": options.prompt}
inputs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
