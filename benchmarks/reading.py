"""The time that it takes to make deltas and chunks of tokens."""

from __future__ import annotations

from time import perf_counter

from mlx_lm_server.config import ModelConfig
from mlx_lm_server.parsing.message_parser import AnswerFormat
from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.server.answers.answer_reader import AnswerReader
from mlx_lm_server.server.answers.generate_request import GenerateRequest
from mlx_lm_server.server.models.model_files import NANO_FOLDER, read_facts
from mlx_lm_server.server.models.model_formats import ModelFormats
from mlx_lm_server.server.models.tokenizer import Tokenizer, load_tokenizer
from mlx_lm_server.server.protocols.openai.stream import ChatChunks, Head

TOOL = {
    "type": "function",
    "function": {"name": "write", "parameters": {"properties": {"text": {"type": "string"}}}},
}
WORDS = "The sun rises in the east, and the river runs to the sea; 3 + 4 = 7. " * 8
ANSWER = (
    f"{WORDS}\n</think>\n\n{WORDS}\n"
    f'<tool_call>\n{{"name": "write", "arguments": {{"text": "{WORDS}"}}}}\n</tool_call>'
)


def time_reading(num_streams: int) -> dict[str, float]:
    """Seconds a token: of plain text, and of one that thinks, speaks and calls; each also with a
    stop string, and the latter with its chunks."""
    tokenizer = load_tokenizer(NANO_FOLDER, read_facts(NANO_FOLDER))
    formats = ModelFormats.of(ModelConfig(), tokenizer.template.source)
    answer = formats.answer("<think>", [TOOL])
    assert answer is not None
    markers = tokenizer.special_ids_of(formats.markers())
    return {
        "plain text": _time(tokenizer, WORDS * 4, num_streams, None, frozenset()),
        "thinks, speaks, calls": _time(tokenizer, ANSWER, num_streams, answer, markers),
        "the same with stops and chunks": _time(
            tokenizer,
            ANSWER,
            num_streams,
            answer,
            markers,
            stops=("###", "User:"),
            with_chunks=True,
        ),
    }


def _time(
    tokenizer: Tokenizer,
    text: str,
    num_streams: int,
    answer: AnswerFormat | None,
    markers: frozenset[int],
    *,
    stops: tuple[str, ...] = (),
    with_chunks: bool = False,
) -> float:
    ids = tokenizer.ids_of(text)
    request = GenerateRequest(
        [1], SamplingParams(len(ids) + 1, seed=0), stops, answer=answer, marker_ids=markers
    )
    readers = [AnswerReader(0, request, tokenizer) for _ in range(num_streams)]
    chunks = ChatChunks(Head("id", 0, "nano"), tokenizer, include_usage=False)
    begun = perf_counter()
    for token in ids:
        for reader in readers:
            delta = reader.read([token], None)
            if delta is not None and with_chunks:
                chunks.text(0, delta.text) if delta.is_plain else chunks.rich(delta)
    return (perf_counter() - begun) / (len(ids) * num_streams)
