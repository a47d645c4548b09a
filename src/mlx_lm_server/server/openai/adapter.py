"""OpenAI's requests → GenerateRequest: ids, resolved sampling, checked limits."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import replace

import msgspec

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.parsing.message_parser import AnswerFormat
from mlx_lm_server.protocol import SamplingParams, ThinkingBudget
from mlx_lm_server.server.generate_request import GenerateRequest
from mlx_lm_server.server.openai.chat_prompt import chat_prompt
from mlx_lm_server.server.openai.infill import infill_prompt
from mlx_lm_server.server.openai.schema import (
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
    """Raises RequestError. One sequence for each choice."""
    prompt = chat_prompt(
        model,
        request.messages,
        request.chat_template_kwargs,
        effort=request.reasoning_effort,
        tools=request.tools,
        tool_choice=request.tool_choice,
    )
    text = await prompt.render(model)
    ids = await model.tokenizer.encode(text, add_special_tokens=False)
    wanted = request.max_completion_tokens
    if wanted is None:
        wanted = request.max_tokens
    answer = model.formats.answer(text, prompt.tools)
    one = _generate_request(request, ids, wanted, model, client_key)
    max_thinking = 0 if prompt.ends_thinking else request.max_thinking_tokens
    if max_thinking is not None:
        thinking = _thinking(max_thinking, answer, model, has_tools=prompt.tools is not None)
        one = replace(one, sampling=msgspec.structs.replace(one.sampling, thinking=thinking))
    one = replace(
        one,
        answer=answer,
        warnings=prompt.warnings,
        marker_ids=model.marker_ids if answer is not None else frozenset(),
        is_one_call=request.parallel_tool_calls is False,
    )
    first, *copies = _choices(one, request.num_choices)
    return [first, *map(_without_prompt_logprobs, copies)]


def _thinking(
    max_tokens: int, answer: AnswerFormat | None, model: ServedModel, *, has_tools: bool
) -> ThinkingBudget:
    if model.thinking is None or answer is None:
        reason = "its reasoning has no end that is a token" if model.formats.can_think else ""
        raise InvalidRequestError(
            "`thinking_budget` is not supported by this model: "
            f"{reason or 'it does not think, or --reasoning-parser leaves that in the text'}",
            param="thinking_budget",
            code="unsupported_parameter",
        )
    return model.thinking.budget(max_tokens, is_open=answer.is_open, has_tools=has_tools)


async def from_completion(
    request: CompletionRequest, model: ServedModel, client_key: str
) -> list[GenerateRequest]:
    """Raises RequestError. One sequence for each choice of each prompt."""
    found: list[GenerateRequest] = []
    for prompt in request.prompt:
        ids = await _prompt_ids(prompt, request.suffix, model)
        one = _generate_request(request, ids, request.max_tokens, model, client_key)
        one = replace(one, scores_end_token=True)
        if request.echo:
            text = prompt if isinstance(prompt, str) else await model.tokenizer.decode(prompt)
            one = _with_echo(one, text)
        found += _choices(one, request.num_choices)
    return found


async def _prompt_ids(prompt: str | list[int], suffix: str | None, model: ServedModel) -> list[int]:
    if isinstance(prompt, str):
        if suffix:
            return await infill_prompt(prompt, suffix, model.tokenizer)
        return await model.tokenizer.encode(prompt, add_special_tokens=True)
    if suffix:
        raise InvalidRequestError("suffix: only together with a text prompt", param="suffix")
    check_ids(prompt, model, "prompt")
    return prompt


def _with_echo(one: GenerateRequest, text: str) -> GenerateRequest:
    """An echo with logprobs has those of the prompt too."""
    wanted = [n for n in (one.sampling.logprobs, one.prompt_logprobs) if n is not None]
    sampling = msgspec.structs.replace(one.sampling, prompt_logprobs=max(wanted, default=None))
    return replace(one, sampling=sampling, echo=text)


def _without_prompt_logprobs(one: GenerateRequest) -> GenerateRequest:
    """The choices of a chat have one prompt, which is told once."""
    sampling = msgspec.structs.replace(one.sampling, prompt_logprobs=None)
    return replace(one, sampling=sampling, prompt_logprobs=None)


def _choices(one: GenerateRequest, num: int) -> list[GenerateRequest]:
    """Choice i draws with the seed plus i, so that each can be had again alone."""
    copies = [one]
    for i in range(1, num):
        seed = (one.sampling.seed + i) & MAX_64_BITS
        sampling = msgspec.structs.replace(one.sampling, seed=seed)
        copies.append(replace(one, sampling=sampling, is_copy=True))
    return copies


def _generate_request(
    request: Sampling,
    prompt_ids: list[int],
    wanted: int | None,
    model: ServedModel,
    client_key: str,
) -> GenerateRequest:
    if not prompt_ids:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    # The engine always draws a token; where only the prompt is wanted, it is left out.
    is_prompt_only = wanted == 0
    max_tokens = model.bounds.max_tokens(len(prompt_ids), 1 if is_prompt_only else wanted)
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidRequestError(
            f"min_tokens: {request.min_tokens} is over max_tokens, which is {max_tokens}",
            param="min_tokens",
        )
    return GenerateRequest(
        prompt_ids=prompt_ids,
        sampling=_sampling(request, max_tokens, model),
        stop_strings=tuple(request.stop),
        priority=request.priority or 0,
        client_key=client_key,
        cache_salt=request.cache_salt or "",
        is_prompt_only=is_prompt_only,
        prompt_logprobs=request.prompt_logprobs,
        wants_progress=bool(request.return_progress),
    )


def _sampling(request: Sampling, max_tokens: int, model: ServedModel) -> SamplingParams:
    stop_token_ids = request.stop_token_ids or []
    check_ids(stop_token_ids, model, "stop_token_ids")
    check_ids(request.logit_bias or (), model, "logit_bias")
    default = model.defaults
    eos_ids = () if request.ignore_eos else model.tokenizer.eos_ids
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
        stop_token_ids=tuple({*stop_token_ids, *eos_ids}),
        min_tokens=request.min_tokens or 0,
        typical_p=_or(request.typical_p, 1.0),
        xtc_probability=request.xtc_probability or 0.0,
        xtc_threshold=_or(request.xtc_threshold, 0.1),
        logprobs=request.num_logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )


def _or(value: float | None, default: float | None) -> float:
    chosen = default if value is None else value
    assert chosen is not None, "defaults_of leaves nothing open"
    return chosen


def check_ids(ids: Collection[int], model: ServedModel, param: str) -> None:
    """Raises InvalidRequestError for an id that is none of the model's."""
    lowest, highest = min(ids, default=0), max(ids, default=0)
    if lowest < 0 or highest >= model.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequestError(
            f"{param}: {wrong} is no token of this model, which has {model.vocab_size}",
            param=param,
        )
