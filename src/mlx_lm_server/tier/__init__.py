"""The disk tier: a cache of token blocks and states that outlives the process.

`SsdStore` is what the engine uses. Every failure of the disk is a shorter prefix, never a wrong
token and never an error. No mlx here: the engine's thread extracts bytes and gives them away.
"""

from __future__ import annotations

from mlx_lm_server.tier.codec import FILE_VERSION
from mlx_lm_server.tier.layout import Namespace
from mlx_lm_server.tier.model_digest import model_digest, namespace_digest
from mlx_lm_server.tier.records import Kind, Prefetched, Record, Tensor, Ticket, Wanted, state_name
from mlx_lm_server.tier.settings import TierSettings
from mlx_lm_server.tier.ssd_store import SsdStore

__all__ = [
    "FILE_VERSION",
    "Kind",
    "Namespace",
    "Prefetched",
    "Record",
    "SsdStore",
    "Tensor",
    "Ticket",
    "TierSettings",
    "Wanted",
    "model_digest",
    "namespace_digest",
    "state_name",
]
