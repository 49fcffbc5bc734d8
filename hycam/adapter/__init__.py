"""HyCAM as an adapter: its settings, the attention it wraps, the hooks on a model, and its place in PEFT."""
