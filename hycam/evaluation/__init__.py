"""Perplexity, generation metrics and expert load of a model over the tasks' rows."""

from hycam.evaluation.expert_load import evaluate_expert_load
from hycam.evaluation.generation import evaluate_generation, evaluate_generation_tasks, generate_responses
from hycam.evaluation.perplexity import evaluate_perplexity

__all__ = [
    "evaluate_expert_load",
    "evaluate_generation",
    "evaluate_generation_tasks",
    "evaluate_perplexity",
    "generate_responses",
]
