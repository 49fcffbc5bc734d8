"""Several tasks with transformers' `Trainer`: python examples/trainer.py --model NAME --output adapter"""

import argparse

from peft import get_peft_model
from rows import load_rows, tokenize
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hycam import HyCAMConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or folder")
parser.add_argument("--output", default="adapter", help="the adapter's folder")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(options.model)
model = get_peft_model(model, HyCAMConfig(r=16, num_experts=5, task_type="CAUSAL_LM"))
model.print_trainable_parameters()

arguments = TrainingArguments(
    output_dir=f"{options.output}-run",
    max_steps=options.steps,
    per_device_train_batch_size=8,
    learning_rate=2e-3,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=tokenize(load_rows(), tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads the labels with -100
)
trainer.train()
model.save_pretrained(options.output)
