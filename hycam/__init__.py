"""HyCAM adapters (CIKM 2025): importing this package makes them known to PEFT."""

from hycam_kernels.versions import require

FLOORS = {"transformers": "5.17", "peft": "0.21"}
require(FLOORS)

from hycam.adapter.attention import HyCAMAttention
from hycam.adapter.binding import RouterStatistics, bind, router_statistics, track_loss
from hycam.adapter.config import HYCAM, HyCAMConfig
from hycam.adapter.hotswap import hotswap_adapter
from hycam.adapter.init_from import init_from
from hycam.adapter.registration import register as _register
from hycam.adapter.tuner import HyCAMModel
from hycam.methods.moelora import MOELORA, MoeLoraConfig, MoeLoraModel
from hycam.methods.multilora import MULTILORA, MultiLoraConfig, MultiLoraModel
from hycam.reliances import warn_where_broken

__all__ = [
    "HyCAMAttention",
    "HyCAMConfig",
    "RouterStatistics",
    "bind",
    "hotswap_adapter",
    "init_from",
    "router_statistics",
    "track_loss",
]

_register(HYCAM, HyCAMConfig, HyCAMModel)
_register(MULTILORA, MultiLoraConfig, MultiLoraModel)
_register(MOELORA, MoeLoraConfig, MoeLoraModel)

warn_where_broken("peft")
