"""From data sets to batches: sources, prompts, splits, tokens, packing, collation."""
