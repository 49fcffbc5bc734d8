"""Perplexity, generation metrics and expert load of a model over the tasks' rows."""
