"""What a run will need, told before anything is loaded."""

from hycam.planning.activations import Activations, trace_activations
from hycam.planning.engines import ENGINES, Engine, Memory, engine_of
from hycam.planning.plan import Plan, plan_memory

__all__ = [
    "ENGINES",
    "Activations",
    "Engine",
    "Memory",
    "Plan",
    "engine_of",
    "plan_memory",
    "trace_activations",
]
