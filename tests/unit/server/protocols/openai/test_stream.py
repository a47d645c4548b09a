from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_lm_server.server.protocols.openai.stream import ChatChunks, CompletionChunks, Head


class NoTokens:
    """Stands in for a tokenizer where chunks name no tokens."""

    def bytes_of(self, token_id: int) -> bytes:
        raise AssertionError("nobody asked for logprobs")


@pytest.mark.parametrize("kind", [ChatChunks, CompletionChunks])
@given(text=st.text(), model=st.text())
def test_a_chunk_is_json_whatever_the_text(
    kind: type[ChatChunks | CompletionChunks], text: str, model: str
) -> None:
    for include_usage in (False, True):
        chunks = kind(Head("id", 1, model), NoTokens(), include_usage=include_usage)
        [choice] = json.loads(chunks.text(3, text)[6:])["choices"]
        assert choice["index"] == 3
        assert (choice.get("text"), choice.get("delta")) in (
            (text, None),
            (None, {"content": text}),
        )
