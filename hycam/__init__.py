"""HyCAM adapters (CIKM 2025): importing this package makes them known to PEFT."""

from .attention import HyCAMAttention
from .binding import RouterStatistics, bind, router_statistics, track_loss
from .config import HyCAMConfig
from .hotswap import hotswap_adapter
from .peft_plugin import register as _register

__all__ = [
    "HyCAMAttention",
    "HyCAMConfig",
    "RouterStatistics",
    "bind",
    "hotswap_adapter",
    "router_statistics",
    "track_loss",
]

_register()
