"""What every protocol's adapter makes of a request, and what every protocol streams from."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lm_server.protocol import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate; checked against all limits, nothing left to default."""

    prompt_ids: list[int]
    sampling: SamplingParams
    stop_strings: tuple[str, ...] = ()
    priority: int = 0
    client_key: str = ""


@dataclass(slots=True)
class Delta:
    """New text of sequence `index`, and its end where `finish_reason` is set."""

    index: int
    text: str
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Usage:
    """Tokens of all sequences of one HTTP request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
