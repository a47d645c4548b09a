"""Fields that clients know and this server does not do.

What would change the answer is refused by name; a value that changes nothing (`best_of: 1`,
`store: false`, null) is let through, since clients send such values unasked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mlx_lm_server.errors import InvalidRequestError

# name → values that change nothing; null never does
Neutral = Mapping[str, tuple[Any, ...]]
COMMON: Neutral = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "logits_processors": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "response_format": ({"type": "text"},),
    "request_id": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
CHAT: Neutral = {
    **COMMON,
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "documents": ([],),
    "add_special_tokens": (False,),
}
COMPLETION: Neutral = {
    **COMMON,
    "add_special_tokens": (True,),
    "thinking_budget": (-1,),
    "thinking_token_budget": (-1,),
    "thinking_budget_tokens": (-1,),
    # Chat's, which clients of both send: without messages they mean nothing.
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "include_reasoning": (False, True),
    "stop_in_reasoning": (False,),
    "reasoning_effort": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
}
MESSAGE: Neutral = {
    "function_call": (),
    "audio": (),
}
# What answers of this server and others have, and what clients add to messages: no prompt is
# different for it, so it is left out, whatever it says.
LEFT_OUT_OF_MESSAGES = frozenset(
    {
        *("annotations", "cache_control", "finish_reason", "id", "index", "logprobs", "model"),
        *("parsed", "provider_specific_fields", "reasoning_details", "refusal", "status"),
        *("stop_reason", "thinking_blocks", "token_ids", "type", "usage", "warning"),
    }
)
STREAM_OPTIONS: Neutral = {
    "include_obfuscation": (False,),
    "continuous_usage_stats": (False,),
}


def supported(
    given: Mapping[str, Any],
    known: Collection[str],
    later: Neutral,
    path: str = "",
    left_out: Collection[str] = (),
) -> dict[str, Any]:
    """The fields of `given` that are done. Raises InvalidRequestError naming any other."""
    kept = {}
    for name, value in given.items():
        if name in left_out:
            continue
        if name in known:
            kept[name] = value
        elif name not in later:
            raise InvalidRequestError(
                f"unknown field `{path}{name}`", param=path + name, code="unknown_parameter"
            )
        elif not _is_neutral(value, later[name]):
            raise InvalidRequestError(
                f"`{path}{name}` is not supported by this server",
                param=path + name,
                code="unsupported_parameter",
            )
    return kept


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Types count: 0 may ask for something where false does not."""
    return value is None or any(type(value) is type(one) and value == one for one in neutral)
