"""OpenAI's requests → GenerateRequest: ids, resolved sampling, checked limits."""

from __future__ import annotations

import secrets
from collections.abc import Collection

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.server.generate_request import GenerateRequest
from mlx_lm_server.server.openai.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Sampling,
)
from mlx_lm_server.server.served_model import ServedModel

MAX_64_BITS = 2**64 - 1
# A nucleus of no mass still holds its likeliest token.
SMALLEST_TOP_P = 1e-6


async def from_chat(
    request: ChatRequest, model: ServedModel, client_key: str
) -> list[GenerateRequest]:
    """Raises RequestError. An answer is one sequence."""
    messages = [_for_template(message) for message in request.messages]
    ids = await model.tokenizer.encode_chat(messages, request.chat_template_kwargs or {})
    wanted = request.max_completion_tokens
    if wanted is None:
        wanted = request.max_tokens
    return [_generate_request(request, ids, wanted, model, client_key)]


async def from_completion(
    request: CompletionRequest, model: ServedModel, client_key: str
) -> list[GenerateRequest]:
    """Raises RequestError. Each prompt is one sequence."""
    found = []
    for prompt in request.prompt:
        if isinstance(prompt, str):
            prompt = await model.tokenizer.encode(prompt, add_special_tokens=True)
        else:
            _check_ids(prompt, model, "prompt")
        found.append(_generate_request(request, prompt, request.max_tokens, model, client_key))
    return found


def _for_template(message: ChatMessage) -> dict[str, str]:
    """What a template sees: only what was given, and `developer` by its older name."""
    fields: dict[str, str] = message.model_dump(exclude_none=True)
    if message.role == "developer":
        fields["role"] = "system"
    return fields


def _generate_request(
    request: Sampling,
    prompt_ids: list[int],
    wanted: int | None,
    model: ServedModel,
    client_key: str,
) -> GenerateRequest:
    if not prompt_ids:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    max_tokens = model.bounds.max_tokens(len(prompt_ids), wanted)
    return GenerateRequest(
        prompt_ids=prompt_ids,
        sampling=_sampling(request, max_tokens, model),
        stop_strings=tuple(request.stop),
        priority=request.priority or 0,
        client_key=client_key,
    )


def _sampling(request: Sampling, max_tokens: int, model: ServedModel) -> SamplingParams:
    stop_token_ids = request.stop_token_ids or []
    _check_ids(stop_token_ids, model, "stop_token_ids")
    _check_ids(request.logit_bias or (), model, "logit_bias")
    default = model.defaults
    seed = secrets.randbits(64) if request.seed is None else request.seed & MAX_64_BITS
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=_or(request.temperature, default.temperature),
        top_p=max(_or(request.top_p, default.top_p), SMALLEST_TOP_P),
        top_k=max(int(_or(request.top_k, default.top_k)), 0),
        min_p=_or(request.min_p, default.min_p),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_or(request.repetition_penalty, default.repetition_penalty),
        logit_bias=request.logit_bias or {},
        stop_token_ids=tuple({*stop_token_ids, *model.tokenizer.eos_ids}),
    )


def _or(value: float | None, default: float | None) -> float:
    chosen = default if value is None else value
    assert chosen is not None, "defaults_of leaves nothing open"
    return chosen


def _check_ids(ids: Collection[int], model: ServedModel, param: str) -> None:
    lowest, highest = min(ids, default=0), max(ids, default=0)
    if lowest < 0 or highest >= model.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequestError(
            f"{param}: {wrong} is no token of this model, which has {model.vocab_size}",
            param=param,
        )
