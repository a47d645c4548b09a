"""The workloads by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlx_lm_server.bench import plans
from mlx_lm_server.bench.plans import Maker

Plan = plans.ClosedLoop | plans.Newcomers | plans.SharedPrefix | plans.Conversation


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    meaning: str
    plan: Callable[[Maker], Plan]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("single", "one client", plans.closed_loop(1)),
        Workload("clients8", "8 clients at once", plans.closed_loop(8)),
        Workload("clients32", "32 clients at once", plans.closed_loop(32)),
        Workload(
            "mixed", "16 clients, each with own lengths, temperature, top_p and seed", plans.mixed
        ),
        Workload("long-prompt", "a long prompt arrives beside 4 decoders", plans.long_prompt),
        Workload("ttft", "new requests arrive beside 8 decoders", plans.ttft),
        Workload("shared-prefix", "8 clients whose prompts begin alike", plans.shared_prefix),
        Workload("conversation", "one chat of several turns", plans.conversation),
    )
}
