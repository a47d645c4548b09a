"""What can be set, in one place.

Each field of these frozen dataclasses is one setting. Its flag (`--max-batch-size`), its variable
(`MLX_LM_SERVER_MAX_BATCH_SIZE`), its key in `--config FILE.toml` (`max-batch-size`) and its line in
docs/reference/flags.md are generated from the field; config_loading.py reads and checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_lm_server.web_names import host_fault, origin_fault

NANO = "nano"
# How a device is treated; see runner/backends.
Way = Literal["x86", "metal", "cuda", "plain"]
Submission = Literal["auto", "late", "early"]


@dataclass(frozen=True)
class Option:
    """How one setting is shown and checked. `unset` says what happens where the value is None;
    `fault` what is wrong with one text of a list, in words that follow it."""

    help: str
    why: str
    unit: str = ""
    unset: str = ""
    aliases: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    is_secret: bool = False
    metavar: str = ""
    fault: Callable[[str], str | None] | None = None


def option(default: Any, help: str, *, why: str, **how: Any) -> Any:
    """A dataclass field that is also a flag."""
    return field(default=default, metadata={"option": Option(help=help, why=why, **how)})


@dataclass(frozen=True)
class ModelConfig:
    model: str = option(
        "mlx-community/Qwen3-4B-4bit",
        "Hub id, local folder, or `nano`: the bundled demo model, which works offline.",
        why="A small, able model that fits an 8 GB Mac.",
        metavar="ID_OR_PATH",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "Name that clients may use for the model; repeat it for several.",
        why="The name a client sends should be the name of the model.",
        unset="the model's id",
        metavar="NAME",
    )
    adapter_path: str | None = option(
        None,
        "Folder of a LoRA adapter made by mlx-lm.",
        why="Most models are served as they are.",
        unset="none",
        metavar="PATH",
    )
    trust_remote_code: bool = option(
        False,
        "Let the model's own Python files run.",
        why="Code from a download runs only when somebody said so.",
    )
    chat_template: str | None = option(
        None,
        "Jinja chat template: a file, the text itself, or the name of one of the model's several.",
        why="A model knows best how it was trained to be asked.",
        unset="the model's",
        metavar="FILE_OR_TEXT",
    )
    chat_template_args: Mapping[str, Any] | None = option(
        None,
        "JSON object of variables for the chat template; a request's own go first.",
        why="A template's own defaults are what its author tested.",
        unset="none",
        metavar="JSON",
    )
    trust_request_chat_template: bool = option(
        False,
        "Let requests bring a chat template of their own (`chat_template`).",
        why="A template is a program: it runs without access to anything, but for as long as it "
        "likes.",
    )
    tool_call_parser: Literal[
        "auto",
        "none",
        "hermes",
        "qwen3_coder",
        "glm",
        "minimax_m2",
        "minimax_m3",
        "deepseek_v32",
        "mistral",
        "deepseek",
        "kimi_k2",
        "solar",
        "functionary_v31",
        "functionary_v32",
        "apertus",
        "kimi_k3",
        "seed_oss",
        "cohere",
        "command_r",
        "granite",
        "granite_20b",
        "nemotron",
        "tool_calls",
        "hunyuan",
        "longcat",
        "internlm",
        "xlam",
        "phi4_mini",
        "firefunction",
        "gigachat",
        "minicpm5",
        "step3",
        "pythonic",
        "lfm2",
        "olmo3",
        "gemma4",
        "llama3_json",
        "function_gemma",
        "harmony",
        "muse",
    ] = option(
        "auto",
        "Format of the model's tool calls; `none` leaves them in the text.",
        why="The chat template shows how the model calls tools.",
    )
    reasoning_parser: Literal[
        "auto",
        "none",
        "seed",
        "cohere",
        "gemma4",
        "magistral",
        "exaone",
        "apertus",
        "minimax_m3",
        "longcat",
        "solar",
        "kimi_k3",
        "apriel",
        "granite",
        "granite_think",
        "hunyuan",
        "think",
        "harmony",
        "muse",
    ] = option(
        "auto",
        "Marks around the model's reasoning; `none` leaves it in the text.",
        why="The chat template shows how the model thinks.",
    )


@dataclass(frozen=True)
class ServerConfig:
    host: str = option(
        "127.0.0.1",
        "Address to listen on.",
        why="Nobody else on the network can use a server that was started without a thought.",
    )
    port: int = option(
        8000, "Port to listen on; 0 takes a free one.", why="As vLLM.", low=0, high=65535
    )
    api_key: str | None = option(
        None,
        "Key that clients must send as `Authorization: Bearer KEY`. The environment variable keeps "
        "it out of the list of processes.",
        why="On the loopback address a key protects little.",
        unset="none",
        is_secret=True,
        metavar="KEY",
    )
    api_key_file: str | None = option(
        None,
        "File with one `key [name]` a line; read again on SIGHUP.",
        why="One key is enough for one user.",
        unset="none",
        metavar="FILE",
    )
    allow_unauthenticated: bool = option(
        False,
        "Listen on an address other than loopback without any key.",
        why="An open model server is found within hours.",
    )
    max_request_bytes: int = option(
        33554432,
        "Largest request body, compressed or not; a larger one is refused with 413, before it is "
        "read where its length is told.",
        why="Agents send their whole history each time; how many large bodies are held and parsed "
        "at once is bounded too.",
        unit="bytes",
        low=1024,
    )
    cors_origins: tuple[str, ...] = option(
        (),
        "Web origin whose pages may call the server, like `http://localhost:3000`; `null` for "
        "those without one, `*` for all; repeat it for several.",
        why="A web page must not reach a local server unasked.",
        unset="none",
        metavar="ORIGIN",
        fault=origin_fault,
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "Name by which clients may ask for the server (the header Host) beside localhost and its "
        "addresses, `*` for any; repeat it for several.",
        why="A web page can give its own name this machine's address, and then reads what it likes "
        "from a server that asks for no key.",
        unset="localhost only, where a server on loopback has no key; else any",
        metavar="HOST",
        fault=host_fault,
    )
    ssl_certfile: str | None = option(
        None, "TLS certificate (PEM).", why="Loopback needs none.", unset="no TLS", metavar="FILE"
    )
    ssl_keyfile: str | None = option(
        None, "TLS key (PEM).", why="Loopback needs none.", unset="no TLS", metavar="FILE"
    )
    uds: str | None = option(
        None,
        "Listen on this Unix socket instead of host and port.",
        why="Most clients speak TCP.",
        unset="none",
        metavar="PATH",
    )
    drain_s: float = option(
        30.0,
        "When the server is told to stop, how long requests in work may go on; a second signal "
        "ends them at once. 0 = at once.",
        why="Most answers end within it. `docker stop` waits 10 s unless told otherwise.",
        unit="s",
        low=0,
    )
    log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = option(
        "info",
        "Least severe messages to log. Prompts are logged at `trace` only.",
        why="One line per request and nothing private.",
    )
    log_format: Literal["text", "json"] = option(
        "text", "Log lines for people, or one JSON object a line.", why="People read it first."
    )


@dataclass(frozen=True)
class KVConfig:
    block_size: int = option(
        16,
        "Tokens per block of the prefix cache.",
        why="As vLLM: small enough to share most of a prefix, large enough to name cheaply.",
        unit="tokens",
        low=1,
        high=1024,
    )
    num_blocks: int | None = option(
        None,
        "Most blocks that the prefix cache keeps beyond running rows.",
        why="It takes what rows leave free and gives it back when they need it.",
        unit="blocks",
        unset="what the memory holds",
        low=0,
    )
    no_prefix_cache: bool = option(
        False,
        "Compute every prompt anew, whatever earlier requests computed.",
        why="With the cache the tokens are the same, and a conversation's next turn starts in "
        "milliseconds.",
    )
    sequence_cache_size: int = option(
        50,
        "Finished sequences whose end is kept too, so that the next turn of a conversation "
        "computes only what is new; 0 keeps none.",
        why="Some more conversations than rows.",
        unit="sequences",
        low=0,
    )
    kv_bits: Literal[16, 8, 4] | None = option(
        None,
        "Bits of each number of K and V while they are kept; 16 leaves them as the model made "
        "them. What a model's heads do not allow is refused.",
        why="Exactness comes first: 8 bits change tokens, and take ten more kernels a layer on a "
        "GPU. Where a row of the model's context does not fit otherwise, there is no choice.",
        unset="auto: 16; on Metal and NVIDIA 8 where a row of the model's whole context (or of "
        "`--max-kv-size`) would not fit the memory in 16",
    )
    kv_group_size: Literal[32, 64, 128] = option(
        64,
        "Numbers of K or V that share a scale when they are kept in 8 or 4 bits; with "
        "`--kv-bits auto` layers that it does not divide take 32, or stay as they are.",
        why="Smaller groups are closer to the model and take more memory: 32 is better for 4 bits.",
    )
    max_kv_size: int | None = option(
        None,
        "Cap on KV tokens over all rows and cached blocks.",
        why="Memory is the real limit, and it is measured.",
        unit="tokens",
        unset="what the memory holds",
        low=16,
    )
    memory_limit_gb: float | None = option(
        None,
        "Hard cap for model, KV and the peak of prefill.",
        why="The device knows what it has, and something is left to other programs: "
        "`docs/concepts/starting.md`.",
        unit="GB (10^9 bytes)",
        unset="from the device",
        low=0.01,
    )


@dataclass(frozen=True)
class TierConfig:
    no_ssd: bool = option(
        False,
        "Keep nothing on disk; else the prefix cache is there too, and outlives the server.",
        why="After a restart conversations go on where they were.",
    )
    ssd_cache_dir: str | None = option(
        None,
        "Folder of the disk cache. Several servers may share one.",
        why="Where caches belong.",
        unset="`mlx-lm-server/kv-cache` in `$XDG_CACHE_HOME` or `~/.cache`, or where neither can "
        "be written to, in a folder of the user's own below the temporary one",
        metavar="DIR",
    )
    ssd_policy: Literal["evict_only", "write_through"] = option(
        "evict_only",
        "Write what leaves memory, and the rest when the server stops; or write everything at "
        "once, so that it outlives a crash too.",
        why="It writes least.",
    )
    ssd_durability: Literal["best_effort", "persistent"] = option(
        "best_effort",
        "Leave the writing to the operating system; or wait for the medium, and try again where "
        "that fails.",
        why="A lost block is computed again.",
    )
    ssd_async_writes: bool = option(
        True,
        "Read and write in a thread beside the model's steps; else between them.",
        why="A slow disk must not slow an answer.",
    )
    ssd_max_size_gb: float = option(
        50.0,
        "Most bytes of the folder, of all models together; 0 = unlimited. It also stays within "
        "80 % of what the disk has free.",
        why="Some hundred long conversations with a small model.",
        unit="GB (10^9 bytes)",
        low=0,
    )
    ssd_ttl_days: float = option(
        7.0,
        "Age since the last use after which a block goes; 0 = never.",
        why="Conversations go on within days.",
        unit="days",
        low=0,
    )
    ssd_writer_queue_size: int = option(
        512,
        "Blocks that may wait for the writer; beyond it they are not stored.",
        why="A slow disk must not fill the memory.",
        unit="blocks",
        low=1,
        high=65536,
    )
    ssd_persistent_max_retries: int = option(
        3,
        "How often a failed write is tried again with `--ssd-durability persistent`.",
        why="What fails for a moment works the second time; what is broken stays so.",
        low=0,
        high=100,
    )
    ssd_flush_interval_s: float = option(
        1.0,
        "Time between commits of the disk cache's index.",
        why="A crash then loses the blocks of a second.",
        unit="s",
        low=0.01,
        high=3600,
    )

    @property
    def writes_through(self) -> bool:
        return self.ssd_policy == "write_through"

    @property
    def is_persistent(self) -> bool:
        return self.ssd_durability == "persistent"

    @property
    def max_size_bytes(self) -> int:
        """0 is unlimited."""
        return round(self.ssd_max_size_gb * 10**9)

    @property
    def ttl_s(self) -> float:
        """0 is for ever."""
        return self.ssd_ttl_days * 86400.0


@dataclass(frozen=True)
class BatchingConfig:
    max_batch_size: int = option(
        32,
        "Rows that decode at once.",
        why="Throughput still grows up to here on the machines measured.",
        aliases=("completion_batch_size",),
        low=1,
        high=4096,
    )
    max_num_batched_tokens: int | None = option(
        None,
        "Token budget of one step, prefill and decode together.",
        why="The engine learns what a step costs and plans for the ITL goal.",
        unit="tokens",
        unset="auto",
        low=1,
    )
    prefill_batch_size: int | None = option(
        None,
        "Most prompts that prefill in one step.",
        why="The scheduler packs as many as the budget holds.",
        unset="auto",
        low=1,
    )
    prefill_step_size: int | None = option(
        None,
        "Largest prefill chunk of a step.",
        why="The scheduler sizes chunks so that decoding rows keep their pace.",
        unit="tokens",
        unset="auto",
        low=1,
    )
    itl_goal_ms: float | None = option(
        None,
        "Longest step that the scheduler plans for while rows decode.",
        why="It follows from the speed measured on this machine.",
        unit="ms",
        unset="auto",
        low=1,
    )
    max_queue_size: int = option(
        128,
        "Requests that may wait for a row; beyond it: 429 with Retry-After.",
        why="Four full batches: longer waits are better spent at the client.",
        low=0,
        high=1_000_000,
    )


@dataclass(frozen=True)
class GenerationConfig:
    default_max_tokens: int | None = option(
        None,
        "max_tokens of a request that names none.",
        why="An answer should end because it is finished.",
        unit="tokens",
        unset="what is left of the context",
        low=1,
    )
    default_temperature: float | None = option(
        None,
        "temperature of a request that names none.",
        why="The model's authors chose it.",
        unset="the model's, else 1.0",
        low=0,
        high=2,
    )
    default_top_p: float | None = option(
        None,
        "top_p of a request that names none.",
        why="The model's authors chose it.",
        unset="the model's, else 1.0",
        low=0,
        high=1,
    )
    default_top_k: int | None = option(
        None,
        "top_k of a request that names none; 0 is off.",
        why="The model's authors chose it.",
        unset="the model's, else 0",
        low=0,
    )
    default_min_p: float | None = option(
        None,
        "min_p of a request that names none.",
        why="The model's authors chose it.",
        unset="the model's, else 0.0",
        low=0,
        high=1,
    )
    default_repetition_penalty: float | None = option(
        None,
        "repetition_penalty of a request that names none.",
        why="The model's authors chose it.",
        unset="the model's, else 1.0",
        low=0.01,
        high=10,
    )
    max_prompt_tokens: int | None = option(
        None,
        "Longest prompt; over it: 400 context_length_exceeded.",
        why="Clients plan by the context that they are told. Long prompts are computed in chunks.",
        unset="the model's context",
        unit="tokens",
        low=1,
    )
    max_generation_tokens: int | None = option(
        None,
        "Most tokens that one request may ask for.",
        why="The context ends a runaway answer.",
        unset="what the prompt leaves of the context",
        unit="tokens",
        low=1,
    )
    request_timeout_s: float = option(
        120.0,
        "Time without a new token after which a request ends; not the whole answer. It does not "
        "run while the engine is started anew. 0 = off.",
        why="Long answers live, stuck ones do not.",
        unit="s",
        low=0,
    )
    keep_alive_s: float = option(
        15.0,
        "Time without text after which a stream gets a comment, and each time again: while a "
        "prompt is computed, and later where tokens give no text. 0 = off.",
        why="Proxies close a connection that is silent for 30 to 60 s.",
        unit="s",
        low=0,
    )
    first_token_timeout_s: float = option(
        300.0,
        "Time in which a request may get no further before its first token, in the queue or in its "
        "prefill. It does not run while the engine is started anew. 0 = off.",
        why="A queue may be long; a prefill may, too, but it comes further all the time.",
        unit="s",
        low=0,
    )


@dataclass(frozen=True)
class AdmissionConfig:
    max_concurrent_requests: int = option(
        0,
        "Requests in work or queued; beyond it: 429. 0 = batch size + queue size.",
        why="Batch and queue already bound it.",
        low=0,
    )


@dataclass(frozen=True)
class ResumeConfig:
    no_resume: bool = option(
        False,
        "End requests with an error when their engine dies; else the next engine goes on where it "
        "stopped.",
        why="A death then costs clients a pause, and not their answers.",
    )
    standby: bool = option(
        True,
        "Keep a second engine process, without a model, that has imported everything and takes "
        "over when the first dies.",
        why="It holds some 40 MB, and answers go on most of a second sooner.",
    )


@dataclass(frozen=True)
class CpuConfig:
    cpu_weights: Literal["auto", "float32", "native"] = option(
        "auto",
        "On a CPU: hold weights in float32 (`auto`: where memory allows), or as they are stored.",
        why="A fast BLAS takes float32 only, and with it a CPU is ten times as fast.",
    )
    no_profile: bool = option(
        False,
        "Measure the model anew; else what was measured at an earlier start on this machine is "
        "used, and corrected while serving.",
        why="The second start is sooner ready.",
    )
    cpu_threads: int | None = option(
        None,
        "Threads for the BLAS.",
        why="Oversubscribed cores cost it dearly, so it takes those that are free.",
        unset="auto",
        low=1,
        high=1024,
    )
    way: Way | None = option(
        None,
        "Treat the device as one of this kind: `x86` with code of our own, the others with MLX's "
        "operations only. For tests, and for finding out what goes wrong.",
        why="Each kind of device has one way that is right and fast on it.",
        unset="that of the device",
    )
    submission: Submission = option(
        "auto",
        "When a GPU is given the next forward: `late`, when the last one has ended, so that K and "
        "V are written in place; `early`, before that, which copies them (up to a sixteenth of the "
        "memory that is free for them); `auto` times both while the model is loaded, on a GPU, and "
        "is `late` on a CPU. Models that run row by row, and the way `x86`, always go late.",
        why="Which costs more, waiting or copying, depends on the device and the model.",
    )


@dataclass(frozen=True)
class Config:
    """All settings of a server, checked and complete; nothing is written into it later."""

    model: ModelConfig = field(default_factory=ModelConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    tier: TierConfig = field(default_factory=TierConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    cpu: CpuConfig = field(default_factory=CpuConfig)


# The help panels of the command line, in its order.
PANELS = {
    "model": "model",
    "server": "server",
    "kv": "kv cache",
    "tier": "disk tier",
    "batching": "batching",
    "generation": "generation",
    "admission": "admission",
    "resume": "resume",
    "cpu": "cpu",
}
