"""Scored tokens → OpenAI's two forms of logprobs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from mlx_lm_server.protocol import TokenLogprobs
from mlx_lm_server.server.answers.generate_request import ScoredToken


class TokenBytes(Protocol):
    """The tokenizer, as far as it is needed here."""

    def bytes_of(self, token_id: int) -> bytes: ...


# JSON has no minus infinity; OpenAI writes this for tokens that cannot come.
LOWEST = -9999.0


def chat_logprobs(tokens: Iterable[ScoredToken], tokenizer: TokenBytes) -> dict[str, Any]:
    found = []
    for token in tokens:
        if token.scores is None:
            continue
        top = zip(token.scores.top_ids, token.scores.top_logprobs, strict=True)
        one = _entry(token.token_id, token.scores.logprob, tokenizer)
        one["top_logprobs"] = [_entry(i, logprob, tokenizer) for i, logprob in top]
        found.append(one)
    return {"content": found, "refusal": None}


def _entry(token_id: int, logprob: float, tokenizer: TokenBytes) -> dict[str, Any]:
    raw = tokenizer.bytes_of(token_id)
    text = raw.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(raw)}


def prompt_logprobs(tokens: Iterable[ScoredToken], tokenizer: TokenBytes) -> list[Any]:
    """vLLM's form: for each token of the prompt but the first, which has null, an object of tokens
    by their ids: the prompt's own and then the likeliest."""
    return [None if t.scores is None else _by_id(t, t.scores, tokenizer) for t in tokens]


def _by_id(token: ScoredToken, scores: TokenLogprobs, tokenizer: TokenBytes) -> dict[str, Any]:
    ranked = {token.token_id: (scores.logprob, scores.rank)}
    top = zip(scores.top_ids, scores.top_logprobs, strict=True)
    for rank, (token_id, logprob) in enumerate(top, 1):
        ranked.setdefault(token_id, (logprob, rank))
    return {
        str(token_id): {
            "logprob": max(logprob, LOWEST),
            "rank": rank,
            "decoded_token": tokenizer.bytes_of(token_id).decode("utf-8", "replace"),
        }
        for token_id, (logprob, rank) in ranked.items()
    }


def completion_logprobs(
    tokens: Iterable[ScoredToken], tokenizer: TokenBytes
) -> dict[str, list[Any]]:
    """The likeliest tokens at a place always have the one that was drawn among them."""
    found: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token in tokens:
        text = _text(token.token_id, tokenizer)
        found["tokens"].append(text)
        found["text_offset"].append(token.offset)
        scores = token.scores
        if scores is None:
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        top = zip(scores.top_ids, scores.top_logprobs, strict=True)
        likeliest = {_text(i, tokenizer): max(lp, LOWEST) for i, lp in reversed(list(top))}
        likeliest[text] = max(scores.logprob, LOWEST)
        found["token_logprobs"].append(likeliest[text])
        found["top_logprobs"].append(likeliest)
    return found


def _text(token_id: int, tokenizer: TokenBytes) -> str:
    """Half a character is written in hexadecimal, as OpenAI does, so that no two are alike."""
    raw = tokenizer.bytes_of(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
