"""The batches that whole models are measured on."""

from benchmarks.models.backbones import ModelShape

# the most telling first; 1,200 tokens are the paper's longest row
MODELS = (ModelShape("Llama-3.1-8B", 8, 1200), ModelShape("Llama-3.2-1B", 8, 1200), ModelShape("Qwen2.5-7B", 8, 1200))
LAYERS = (ModelShape("Llama-3.1-8B", 8, 1200), ModelShape("Llama-3.2-1B", 2, 1200))
GENERATION = (ModelShape("Llama-3.1-8B", 1, 128), ModelShape("Llama-3.1-8B", 16, 128))
CPU_MODELS = (ModelShape("tiny-llama", 2, 128, rank=16), ModelShape("tiny-qwen2", 2, 128, rank=16))
CPU_GENERATION = (ModelShape("tiny-llama", 1, 32, rank=16),)
# a step bound by the backbone's products, as on a laptop
CPU_STEPS = (ModelShape("SmolLM2-135M", 2, 256),)
# the study's batches
CPU_RESPONSES = ModelShape("SmolLM2-135M", 4, 192)
# deep and wide enough that a token is bound by reading weights; the prompt hardly counts
CPU_DECODING = (ModelShape("SmolLM2-135M", 1, 8),)
# by the device's type
NEW_TOKENS = {"cuda": 64, "cpu": 16}
# the 7B shape whose longest row is looked for
LONGEST = ModelShape("Qwen2.5-7B", 1, 1024)
