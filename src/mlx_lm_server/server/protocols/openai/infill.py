"""Fill in the middle: prefix and suffix in the words of the model's family."""

from __future__ import annotations

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.server.models.tokenizer import Tokenizer

# Tokens before the prefix, before the suffix, and where the middle begins; `True` where the suffix
# comes first.
FAMILIES: tuple[tuple[tuple[str, ...], bool], ...] = (
    (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), False),
    (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), False),
    (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), False),
    (("▁<PRE>", "▁<SUF>", "▁<MID>"), False),
    (("[PREFIX]", "[SUFFIX]"), True),
)


async def infill_prompt(prefix: str, suffix: str, tokenizer: Tokenizer) -> list[int]:
    """The prompt after which the model writes the middle, with what leads every text (BOS) once.

    Raises InvalidRequestError where the model has no such tokens.
    """
    leading = tokenizer.leading_ids
    for tokens, is_suffix_first in FAMILIES:
        ids = [i for token in tokens if (i := tokenizer.id_of(token)) is not None]
        if len(ids) < len(tokens):
            continue
        before = await tokenizer.encode(prefix, add_special_tokens=False)
        if before[: len(leading)] == leading:
            before = before[len(leading) :]
        after = await tokenizer.encode(suffix, add_special_tokens=False)
        if is_suffix_first:
            return [*leading, ids[1], *after, ids[0], *before]
        return [*leading, ids[0], *before, ids[1], *after, ids[2]]
    raise InvalidRequestError(
        "`suffix` is not supported by this model: it has no tokens to fill in a middle",
        param="suffix",
        code="unsupported_parameter",
    )
