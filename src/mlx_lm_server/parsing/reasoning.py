"""How families of models mark what they think before they answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningFormat:
    """Text between `start` and `end` is reasoning. `dropped` are markers around the answer, which
    belong to neither."""

    name: str
    start: str
    end: str
    dropped: tuple[str, ...] = ()

    def is_open_after(self, prompt: str) -> bool:
        """Whether the prompt's last letters began the reasoning already."""
        return prompt.rstrip().endswith(self.start.rstrip())


FORMATS = (
    ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
    ReasoningFormat(
        "cohere",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    ),
    ReasoningFormat("gemma4", "<|channel>thought\n", "<channel|>"),
    ReasoningFormat("magistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("exaone", "<thought>", "</thought>"),
    ReasoningFormat("granite", "Here is my thought process:", "Here is my response:"),
    ReasoningFormat("think", "<think>", "</think>"),
)
