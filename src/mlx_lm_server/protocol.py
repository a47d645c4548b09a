"""Messages between the server process and an engine process.

A frame is a 4-byte little-endian length and a msgpack body: one message of a tagged union. The
first message to an engine is `LoadModel`, or `WarmUp` some time before that; the first from it is
`LoadProgress`, and after that either `Ready` or `LoadFailed`. Every `AddRequest` is answered by
exactly one `RequestOutput` whose `finish_reason` is set, also after an `Abort`, unless the engine
ends before that.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from mlx_lm_server.config import Submission, TierConfig, Way
from mlx_lm_server.tier_stats import TierStats

FinishReason = Literal["stop", "length", "abort", "error"]
CpuWeights = Literal["auto", "float32", "native"]
Batching = Literal["packed", "split", "alone"]
MemoryPressure = Literal["normal", "warn", "critical"]

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 256 * 1024 * 1024


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, array_like=True):
    """Base of all messages."""


class ThinkingBudget(msgspec.Struct, frozen=True, array_like=True):
    """How many tokens a row may think. Reasoning begins after the row of `start_ids`, or with the
    prompt's end where `is_open`, and ends with any of `end_ids`. Where it would have more than
    `max_tokens`, `forced_ids` come next, which begin with an end."""

    max_tokens: int
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    forced_ids: tuple[int, ...]
    is_open: bool = False


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """How one request draws its tokens; resolved by the server, nothing is left to default here.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.
    `seed` is a 64-bit unsigned number: the server draws one where the client gave none.
    `stop_token_ids` holds the model's EOS ids too; such a token ends the request, is counted and
    is sent, and the server leaves it out of the text. It is not drawn before `min_tokens`.
    `typical_p` 1 and `xtc_probability` 0 are off. `logprobs` is how many alternatives to name
    beside each drawn token, `prompt_logprobs` the same for each token of the prompt; None is off.
    Nothing but `allowed_token_ids` is drawn, where there are any, and none of `bad_words`, which
    are sequences of tokens. A forced token goes before all of that.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    thinking: ThinkingBudget | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()


# ---- server → engine


class DiskTier(msgspec.Struct, frozen=True, array_like=True):
    """Where the prefix cache is kept on disk, as an absolute path, and what was set about it."""

    folder: str
    flags: TierConfig = TierConfig()


class WarmUp(Message, frozen=True):
    """Import what a `LoadModel` with these settings will need, and wait for it."""

    num_threads: int | None = None
    with_adapters: bool = False


class LoadModel(Message, frozen=True):
    """What to serve and within which bounds. None means: the engine chooses by measuring.
    `keeps_profile`: what it measures is kept, and used at the next start. `way` treats the device
    as one of another kind; `submission` is when forwards are submitted, which `auto` measures.
    `measured` is what the engine before this one had measured (`Ready.measured`): it is taken as it
    is, so that the same is planned, and sooner."""

    model_path: str
    adapter_path: str | None = None
    trust_remote_code: bool = False
    cpu_weights: CpuWeights = "auto"
    num_threads: int | None = None
    max_batch_size: int = 32
    max_num_batched_tokens: int | None = None
    prefill_step_size: int | None = None
    prefill_batch_size: int | None = None
    itl_goal_s: float | None = None
    max_kv_tokens: int | None = None
    prefix_cache: bool = True
    block_size: int = 16
    num_blocks: int | None = None
    sequence_cache_size: int = 50
    memory_limit_bytes: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    disk_tier: DiskTier | None = None
    keeps_profile: bool = True
    way: Way | None = None
    submission: Submission = "auto"
    measured: bytes = b""


class AddRequest(Message, frozen=True):
    """`message_ends` are the prompt positions, in tokens, where the next request of a conversation
    may part from this one: checkpoints of state that cannot be cut anywhere are kept there.
    Requests share cached prefixes only within one `cache_salt`. `output_ids` are tokens that an
    engine before this one gave: the request goes on behind them, and only what follows is told."""

    req_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    client_key: str = ""
    cache_salt: str = ""
    message_ends: list[int] = []
    wants_progress: bool = False
    output_ids: list[int] = []


class Abort(Message, frozen=True):
    """End a request now. Unknown ids are ignored: the request may just have ended by itself."""

    req_id: str


class Shutdown(Message, frozen=True):
    """End the engine process; the server has drained it before. What only memory has goes to the
    disk tier first, for a bounded time."""


# ---- engine → server


class LoadProgress(Message, frozen=True):
    """`fraction` of the load that is done, 0 to 1; `stage` says in words what comes now."""

    stage: str
    fraction: float


class Ready(Message, frozen=True):
    """The model is loaded and the engine takes requests.

    `kv_limit_tokens` is the longest row that fits alone; `kv_bytes_per_token` holds as long as no
    window is full. `batching` says how rows share forwards, `batching_reason` why not in a better
    way. `kv_bits` is the fewest of any layer, 16 where none is quantised; `kv_format` says it all.
    `disk_tier` is the folder of this model's cache, or empty where there is none. `way` is how the
    device is treated, `submission` in words when its forwards are submitted. `measured` is what a
    next engine need not measure again.
    """

    model_type: str
    device: str
    blas: str
    weights: str
    weights_bytes: int
    vocab_size: int
    context_tokens: int
    kv_bytes_per_token: int
    kv_limit_bytes: int
    memory_limit_bytes: int
    load_s: float
    kv_limit_tokens: int = 0
    batching: Batching = "packed"
    batching_reason: str = ""
    kv_bits: int = 16
    kv_format: str = ""
    disk_tier: str = ""
    way: str = ""
    submission: str = "late"
    measured: bytes = b""


class LoadFailed(Message, frozen=True):
    """`kind` is the name of a class in `errors`, so that the server raises the same type."""

    kind: str
    message: str


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithm of the model's probability of a token, before temperature and penalties,
    and the likeliest tokens there, the likeliest first. `rank` is its place among all tokens, the
    likeliest being 1; counted for prompts only, else 0."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]
    rank: int = 0


class CacheReport(msgspec.Struct, frozen=True, array_like=True):
    """What a request found in the prefix cache when it was admitted.

    `num_cached_tokens` of its prompt were not computed: `num_from_rows` of them copied from
    requests in flight, the others from the pool. Up to `num_nearest_tokens` it was equal to the
    nearest cached text, which from there on reads `nearest_ids` where the prompt reads
    `prompt_ids`; both are empty where nothing was near, or nothing differs. `why` says in words
    what kept the rest from being found; `recompute_s` forecasts what computing it costs.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_from_rows: int
    num_nearest_tokens: int
    prompt_ids: list[int]
    nearest_ids: list[int]
    why: str
    recompute_s: float


class RequestOutput(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """New tokens of one request, and its end where `finish_reason` is set.

    `logprobs` has one entry for each token, `prompt_logprobs` one for each prompt token but the
    first; both only where they were asked for. `queue_s`, `prefill_s` and `cache` come with the
    first token: how long the request waited for a row, and from then on for the token.
    `num_preemptions` is how often it has given its row back so far.
    Where `num_computed_tokens` is set, nothing but `num_reused_tokens` is: they say how many of the
    tokens that it begins with are computed, and how many of these were found in the cache.
    """

    req_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    cache: CacheReport | None = None
    error: str | None = None
    queue_s: float = 0.0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_computed_tokens: int = 0
    num_reused_tokens: int = 0
    prefill_s: float = 0.0
    num_preemptions: int = 0


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges at the end of a step; totals count from the engine's start. Blocks are those of the
    prefix cache's pool; its queries and hits are counted in prompt tokens. `prompt_tokens_total`
    counts what was asked, `prefill_tokens_total` what was computed. `num_deferred` of those that
    wait do so for the disk tier, not for a row. `memory_pressure` is how short the system finds the
    machine's memory, "normal" where it does not say."""

    num_running: int
    num_waiting: int
    kv_used_bytes: int
    kv_limit_bytes: int
    kv_live_tokens: int
    num_steps_total: int
    num_preemptions_total: int
    prompt_tokens_total: int
    generation_tokens_total: int
    forecast_step_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_memory_bytes: int
    kv_cached_bytes: int = 0
    num_cached_blocks: int = 0
    num_free_blocks: int = 0
    prefix_cache_queries_total: int = 0
    prefix_cache_hits_total: int = 0
    cache_evictions_total: int = 0
    prefill_tokens_total: int = 0
    tier: TierStats | None = None
    num_deferred: int = 0
    memory_pressure: MemoryPressure = "normal"


class Outputs(Message, frozen=True):
    """What one step gave. Sent after each step with output, and about once a second when idle:
    its arrival is the engine's heartbeat. `step_tokens` has the number of tokens, prompts' and
    answers', of each step since the last message."""

    outputs: list[RequestOutput]
    stats: EngineStats
    step_tokens: list[int] = []


ToEngine = WarmUp | LoadModel | AddRequest | Abort | Shutdown
ToServer = LoadProgress | Ready | LoadFailed | Outputs

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


def encode_frame(message: Message) -> bytes:
    """One message as length and body."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


class FrameError(ValueError):
    """What came over the socket is no frame; the stream cannot be trusted further."""


class FrameBuffer:
    """Cuts a byte stream into frame bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def has_begun(self) -> bool:
        """Returns whether a frame has come in part."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that `data` completes. Raises FrameError for an impossible length."""
        self._buffer += data
        bodies = []
        start = 0
        while len(self._buffer) - start >= LENGTH.size:
            [length] = LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {length} bytes")
            end = start + LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return bodies


def decode_to_engine(body: bytes | memoryview) -> ToEngine:
    """Raises msgspec.ValidationError for anything that is no message to an engine."""
    return _to_engine.decode(body)


def decode_to_server(body: bytes | memoryview) -> ToServer:
    """Raises msgspec.ValidationError for anything that is no message to the server."""
    return _to_server.decode(body)
