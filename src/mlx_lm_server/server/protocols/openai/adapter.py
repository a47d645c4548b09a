"""OpenAI's requests → GenerateRequest: ids, resolved sampling, checked limits."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import msgspec

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.parsing.message_parser import AnswerFormat
from mlx_lm_server.protocol import SamplingParams, ThinkingBudget
from mlx_lm_server.server.answers.generate_request import GenerateRequest
from mlx_lm_server.server.models.served_model import ServedModel
from mlx_lm_server.server.models.tokenizer import MAX_INLINE_CHARS, Tokenizer
from mlx_lm_server.server.protocols.openai.chat_prompt import chat_prompt
from mlx_lm_server.server.protocols.openai.infill import infill_prompt
from mlx_lm_server.server.protocols.openai.schema import (
    ChatRequest,
    CompletionRequest,
    Sampling,
)

MAX_64_BITS = 2**64 - 1
# A nucleus of no mass still holds its likeliest token.
SMALLEST_TOP_P = 1e-6
NO_RETENTION = "prompt_cache_retention has no effect: what is cached stays while there is room"


@dataclass(frozen=True)
class _Asked:
    """What all sequences of a request have in common. `prompt` and `name` are the fields that hold
    the prompt and `max_tokens`, which is what the client named."""

    request: Sampling
    model: ServedModel
    client_key: str
    bad_words: tuple[tuple[int, ...], ...]
    max_tokens: int | None
    prompt: str = "prompt"
    name: str = "max_tokens"


async def from_chat(
    request: ChatRequest, model: ServedModel, client_key: str
) -> list[GenerateRequest]:
    """Returns one sequence for each choice. Raises RequestError."""
    prompt = chat_prompt(
        model,
        request.messages,
        request.chat_template_kwargs,
        effort=request.reasoning_effort,
        tools=request.tools,
        tool_choice=request.tool_choice,
        continues=request.continues,
    )
    text = await prompt.render(
        model, add_generation_prompt=request.add_generation_prompt is not False
    )
    ids = await model.tokenizer.encode(text, add_special_tokens=False)
    bad_words = await _bad_words(request, model.tokenizer)
    asked = _Asked(request, model, client_key, bad_words, request.max_tokens, "messages")
    if request.max_completion_tokens is not None:
        wanted = request.max_completion_tokens
        asked = replace(asked, max_tokens=wanted, name="max_completion_tokens")
    answer = model.formats.answer(text, prompt.tools, continues=request.continues)
    one = _generate_request(asked, ids)
    max_thinking = 0 if prompt.ends_thinking else request.max_thinking_tokens
    if max_thinking is not None:
        thinking = _thinking(max_thinking, answer, model, has_tools=prompt.tools is not None)
        one = replace(one, sampling=msgspec.structs.replace(one.sampling, thinking=thinking))
    one = replace(
        one,
        answer=answer,
        warnings=(*prompt.warnings, *one.warnings),
        marker_ids=one.marker_ids | (model.marker_ids if answer is not None else frozenset()),
        is_one_call=request.parallel_tool_calls is False,
        stops_reasoning=bool(request.stop_in_reasoning),
        hides_reasoning=request.include_reasoning is False,
    )
    first, *copies = _choices(one, request.num_choices)
    return [first, *map(_without_prompt, copies)]


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
    """Returns one sequence for each choice of each prompt. Raises RequestError."""
    found: list[GenerateRequest] = []
    bad_words = await _bad_words(request, model.tokenizer)
    asked = _Asked(request, model, client_key, bad_words, request.max_tokens)
    if request.suffix and request.truncate_prompt_tokens is not None:
        raise InvalidRequestError(
            "truncate_prompt_tokens: not together with `suffix`", param="truncate_prompt_tokens"
        )
    for prompt in request.prompt:
        ids = await _prompt_ids(prompt, request.suffix, model)
        one = replace(_generate_request(asked, ids), scores_end_token=True)
        if request.echo:
            one = _with_echo(one, await _echoed(prompt, one.prompt_ids, len(ids), model))
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


async def _echoed(
    prompt: str | list[int], kept: list[int], num_given: int, model: ServedModel
) -> str:
    """The text of the prompt, as far as it is kept."""
    if isinstance(prompt, str) and len(kept) == num_given:
        return prompt
    return await model.tokenizer.decode(kept)


def _with_echo(one: GenerateRequest, text: str) -> GenerateRequest:
    """An echo with logprobs has those of the prompt too."""
    wanted = [n for n in (one.sampling.logprobs, one.prompt_logprobs) if n is not None]
    sampling = msgspec.structs.replace(one.sampling, prompt_logprobs=max(wanted, default=None))
    return replace(one, sampling=sampling, echo=text)


def _without_prompt(one: GenerateRequest) -> GenerateRequest:
    """The choices of a chat have one prompt, which is told once."""
    sampling = msgspec.structs.replace(one.sampling, prompt_logprobs=None)
    return replace(one, sampling=sampling, prompt_logprobs=None, returns_prompt_ids=False)


def _choices(one: GenerateRequest, num: int) -> list[GenerateRequest]:
    """Choice i draws with the seed plus i, so that each can be had again alone."""
    copies = [one]
    for i in range(1, num):
        seed = (one.sampling.seed + i) & MAX_64_BITS
        sampling = msgspec.structs.replace(one.sampling, seed=seed)
        copies.append(replace(one, sampling=sampling, is_copy=True))
    return copies


def _generate_request(asked: _Asked, prompt_ids: list[int]) -> GenerateRequest:
    request, bounds, wanted = asked.request, asked.model.bounds, asked.max_tokens
    if not prompt_ids:
        raise InvalidRequestError("the prompt is empty", param=asked.prompt)
    if (kept := request.truncate_prompt_tokens) is not None:
        prompt_ids = prompt_ids[-(bounds.longest_prompt(wanted) if kept == -1 else kept) :]
    # The engine always draws a token; where only the prompt is wanted, it is left out.
    is_prompt_only = wanted == 0
    max_tokens = bounds.max_tokens(
        len(prompt_ids), 1 if is_prompt_only else wanted, asked.prompt, asked.name
    )
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidRequestError(
            f"min_tokens: {request.min_tokens} is over {asked.name}, which is {max_tokens}",
            param="min_tokens",
        )
    shows_specials = request.skip_special_tokens is False
    return GenerateRequest(
        prompt_ids=prompt_ids,
        sampling=_sampling(asked, max_tokens),
        stop_strings=tuple(request.stop),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        keeps_stop=bool(request.include_stop_str_in_output),
        marker_ids=asked.model.tokenizer.special_ids if shows_specials else frozenset(),
        priority=request.priority or 0,
        client_key=asked.client_key,
        cache_salt=request.cache_salt or "",
        is_prompt_only=is_prompt_only,
        prompt_logprobs=request.prompt_logprobs,
        returns_token_ids=bool(request.return_token_ids),
        returns_prompt_ids=bool(request.return_token_ids),
        wants_progress=bool(request.return_progress),
        prompt_cache_key=request.prompt_cache_key,
        warnings=(NO_RETENTION,) if request.prompt_cache_retention else (),
    )


async def _bad_words(request: Sampling, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    words = request.bad_words or ()
    if sum(map(len, words)) <= MAX_INLINE_CHARS:
        return _tokens_of(words, tokenizer)
    return await asyncio.to_thread(_tokens_of, words, tokenizer)


def _tokens_of(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Returns the ids of each word with a space before it and without, since tokenizers tell the
    two apart; one of nothing but white space stays as it is."""
    texts = [form for word in words for form in _forms(word)]
    ids = (tuple(tokenizer.ids_of(text)) for text in texts)
    return tuple(dict.fromkeys(one for one in ids if one))


def _forms(word: str) -> tuple[str, ...]:
    bare = word.lstrip()
    return (bare, f" {bare}") if bare else (word,)


def _check_something_is_left(asked: _Asked, stop_token_ids: Collection[int]) -> None:
    """Raises InvalidRequestError where nothing could be drawn."""
    allowed = set(asked.request.allowed_token_ids or ())
    if not allowed:
        return
    left = allowed - {word[0] for word in asked.bad_words if len(word) == 1}
    if not left:
        reason = "`bad_words` leaves none of them"
    elif asked.request.min_tokens and not left - set(stop_token_ids):
        reason = "all of them end the answer, which `min_tokens` forbids"
    else:
        return
    raise InvalidRequestError(f"allowed_token_ids: {reason}", param="allowed_token_ids")


def _sampling(asked: _Asked, max_tokens: int) -> SamplingParams:
    request, model = asked.request, asked.model
    stop_token_ids = request.stop_token_ids or []
    check_ids(stop_token_ids, model, "stop_token_ids")
    check_ids(request.logit_bias or (), model, "logit_bias")
    check_ids(request.allowed_token_ids or (), model, "allowed_token_ids")
    default = model.defaults
    eos_ids = () if request.ignore_eos else model.tokenizer.eos_ids
    all_stop_ids = tuple({*stop_token_ids, *eos_ids})
    _check_something_is_left(asked, all_stop_ids)
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
        stop_token_ids=all_stop_ids,
        min_tokens=request.min_tokens or 0,
        typical_p=_or(request.typical_p, 1.0),
        xtc_probability=request.xtc_probability or 0.0,
        xtc_threshold=_or(request.xtc_threshold, 0.1),
        logprobs=request.num_logprobs,
        prompt_logprobs=request.prompt_logprobs,
        allowed_token_ids=tuple(dict.fromkeys(request.allowed_token_ids or ())),
        bad_words=asked.bad_words,
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
