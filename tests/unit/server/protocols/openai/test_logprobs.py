from __future__ import annotations

import math

from mlx_lm_server.protocol import TokenLogprobs
from mlx_lm_server.server.answers.generate_request import ScoredToken
from mlx_lm_server.server.protocols.openai.logprobs import (
    LOWEST,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)

# A token that could not come, beside the one that did.
TOKEN = ScoredToken(1, TokenLogprobs(-math.inf, [2, 3], [0.0, -math.inf], rank=3), 0)


class Letters:
    """Id 1 is b, 2 is c …"""

    def bytes_of(self, token_id: int) -> bytes:
        return bytes([ord("a") + token_id])


def test_a_token_that_cannot_come_has_a_number_in_every_form() -> None:
    [one] = chat_logprobs([TOKEN], Letters())["content"]
    assert [one["logprob"], *(top["logprob"] for top in one["top_logprobs"])] == [
        LOWEST,
        0.0,
        LOWEST,
    ]
    [ranked] = prompt_logprobs([TOKEN], Letters())
    assert {key: entry["logprob"] for key, entry in ranked.items()} == {
        "1": LOWEST,
        "2": 0.0,
        "3": LOWEST,
    }
    found = completion_logprobs([TOKEN], Letters())
    assert found["token_logprobs"] == [LOWEST]
    assert found["top_logprobs"] == [{"b": LOWEST, "c": 0.0, "d": LOWEST}]
