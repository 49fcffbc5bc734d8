"""What the finished study of the tests consists of."""

# method and seed; the other cells are not done
CELLS = [("full", 0), ("lora", 0), ("hycam", 0), ("hycam", 1), ("three", 0)]
TEXTS = [f"The {animal} 1 is red and the {animal} 22 is as green as it was." for animal in ("cat", "owl", "bee", "ant")]
FIGURES = [
    "expert_load-hycam-tiny",
    "expert_load-three-tiny",
    "loss_curves-tiny",
    "modulation-tiny",
    "sweep-tiny",
    "value_states-tiny",
]
