"""The same with TRL's `SFTTrainer`: python examples/sft.py --model NAME --output adapter"""

import argparse

import torch
from rows import load_rows
from trl import SFTConfig, SFTTrainer

from hycam import HyCAMConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or folder")
parser.add_argument("--output", default="adapter", help="the adapter's folder")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

trainer = SFTTrainer(
    model=options.model,
    args=SFTConfig(
        output_dir=f"{options.output}-run",
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        max_length=128,
        logging_steps=10,
        bf16=torch.cuda.is_available(),  # TRL's own default is true everywhere
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=load_rows(),  # columns prompt and completion: the loss is of the completion alone
    peft_config=HyCAMConfig(r=16, num_experts=5, task_type="CAUSAL_LM"),
)
trainer.train()
trainer.model.save_pretrained(options.output)
