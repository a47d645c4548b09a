"""How families of models mark what they think before they answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningFormat:
    """Text between `start` and `end` is reasoning. `dropped` are marks around the answer, which
    belong to neither. `signs` are words of templates that tell this format from another with the
    same marks."""

    name: str
    start: str
    end: str
    dropped: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()

    def is_open_after(self, prompt: str, *, continues: bool = False) -> bool:
        """Tells whether the prompt's last letters began the reasoning already; where it `continues`
        a message, also whether that has begun it and not ended it."""
        start = prompt.rfind(self.start.rstrip())
        if continues:
            return start > prompt.rfind(self.end)
        return prompt.rstrip().endswith(self.start.rstrip())

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.start, self.end, *self.dropped)


FORMATS = (
    ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
    ReasoningFormat(
        "cohere",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    ),
    ReasoningFormat("gemma4", "<|channel>thought", "<channel|>"),
    ReasoningFormat("magistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("exaone", "<thought>", "</thought>"),
    ReasoningFormat("apertus", "<|inner_prefix|>", "<|inner_suffix|>"),
    ReasoningFormat("minimax_m3", "<mm:think>", "</mm:think>"),
    ReasoningFormat("longcat", "<longcat_think>", "</longcat_think>"),
    ReasoningFormat(
        "solar",
        "<|think|>",
        "<|end|>",
        ("<|begin|>assistant", "<|content|>"),
        signs=("<|think|>", "<|begin|>assistant"),
    ),
    ReasoningFormat(
        "kimi_k3",
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        (
            *("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
            *("<|close|>message<|sep|>", "<|end_of_msg|>"),
        ),
    ),
    ReasoningFormat(
        "apriel",
        "Here are my reasoning steps:\n",
        "[BEGIN FINAL RESPONSE]",
        ("[END FINAL RESPONSE]",),
    ),
    ReasoningFormat("granite", "Here is my thought process:", "Here is my response:"),
    ReasoningFormat(
        "granite_think",
        "<think>",
        "</think>",
        ("<response>", "</response>"),
        signs=("<think></think>", "<response></response>"),
    ),
    ReasoningFormat(
        "hunyuan", "<think>", "</think>", ("<answer>", "</answer>"), signs=("<think>", "<answer>")
    ),
    ReasoningFormat("think", "<think>", "</think>"),
)
