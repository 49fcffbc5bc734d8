"""From a recipe to a trained adapter: what a run needs, checked first; the run, its folder and its checkpoints."""
