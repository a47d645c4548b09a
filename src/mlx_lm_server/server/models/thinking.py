"""What begins and ends the reasoning of the served model, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mlx_lm_server.protocol import ThinkingBudget
from mlx_lm_server.server.models.model_formats import ModelFormats

HARMONY_START = "<|channel|>analysis<|message|>"
HARMONY_ENDS = ("<|end|>", "<|start|>", "<|channel|>", "<|call|>", "<|return|>")
HARMONY_ANSWER = "<|end|><|start|>assistant<|channel|>final<|message|>"
# Where there are tools the model still chooses between an answer and a call.
HARMONY_NEXT = "<|end|><|start|>assistant"


class TokenIds(Protocol):
    """The tokenizer, as far as it is needed here."""

    def id_of(self, token: str) -> int | None: ...
    def ids_of(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class ThinkingMarks:
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    forced_ids: tuple[int, ...]
    forced_before_calls: tuple[int, ...]

    @classmethod
    def of(cls, formats: ModelFormats, tokenizer: TokenIds) -> ThinkingMarks | None:
        """Returns the marks; None where the model does not think, or ends it with more than one
        token: then only the text would tell whether it has ended."""
        if formats.is_harmony:
            ends = [i for text in HARMONY_ENDS if (i := tokenizer.id_of(text)) is not None]
            answer, next_ = tokenizer.ids_of(HARMONY_ANSWER), tokenizer.ids_of(HARMONY_NEXT)
            if answer[0] not in ends:
                return None
            return cls(_ids(HARMONY_START, tokenizer), tuple(ends), tuple(answer), tuple(next_))
        if formats.reasoning is None:
            return None
        end = tokenizer.id_of(formats.reasoning.end)
        if end is None:
            return None
        return cls(_ids(formats.reasoning.start, tokenizer), (end,), (end,), (end,))

    def budget(self, max_tokens: int, *, is_open: bool, has_tools: bool) -> ThinkingBudget:
        forced: Sequence[int] = self.forced_before_calls if has_tools else self.forced_ids
        return ThinkingBudget(max_tokens, self.start_ids, self.end_ids, tuple(forced), is_open)


def _ids(text: str, tokenizer: TokenIds) -> tuple[int, ...]:
    whole = tokenizer.id_of(text)
    return tuple(tokenizer.ids_of(text)) if whole is None else (whole,)
