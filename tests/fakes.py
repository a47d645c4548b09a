"""A fake engine: the protocol over a socket pair, no model behind it.

Run as a program it is what a supervisor spawns: `python fakes.py --fd N [--vocab-size …]`. It
generates by repeating the prompt's ids, one token per row and step, and ends with the id of
`--eos` where one is given and the prompt has been said. What a single request shall suffer is told
by its seed, so that one server serves many tests.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import get_type_hints

import msgspec

from mlx_lm_server import protocol
from mlx_lm_server.protocol import (
    LENGTH,
    Abort,
    AddRequest,
    EngineStats,
    LoadFailed,
    LoadModel,
    LoadProgress,
    Outputs,
    Ready,
    RequestOutput,
    Shutdown,
    TokenLogprobs,
    WarmUp,
    decode_to_engine,
    encode_frame,
)
from mlx_lm_server.tier_stats import TierCounters, TierStats

# Seeds with a meaning.
DIE = 666  # the engine ends at once
DIE_AFTER_TOKEN = 667  # … after the first token of this request, once
HANG = 668  # the engine stops reading and writing
SILENT = 669  # this request never gets a token
SILENT_AFTER_TOKEN = 670  # … after its first
FAIL = 671  # this request ends with an error
GARBAGE = 672  # the engine sends what is no frame
DEAF = 673  # the engine closes its socket and goes on


# How long each prefill is said to take.
PREFILL_S = 0.25


@dataclass
class Row:
    request: AddRequest
    num_said: int = 0
    num_computed: int = 0
    arrival_s: float = field(default_factory=time.monotonic)
    admitted_s: float | None = None

    @property
    def seed(self) -> int:
        return self.request.sampling.seed


class Seen(msgspec.Struct):
    """What a test wants to know of a request."""

    priority: int
    client_key: str
    max_tokens: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    stop_token_ids: tuple[int, ...]
    min_tokens: int
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    logprobs: int | None
    prompt_logprobs: int | None
    thinking: protocol.ThinkingBudget | None
    allowed_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, request: AddRequest) -> Seen:
        sampling = {f: getattr(request.sampling, f) for f in request.sampling.__struct_fields__}
        return cls(priority=request.priority, client_key=request.client_key, **sampling)


@dataclass
class FakeEngine:
    link: socket.socket
    options: argparse.Namespace
    rows: dict[str, Row] = field(default_factory=dict)
    buffer: bytearray = field(default_factory=bytearray)
    num_steps: int = 0
    num_tokens: int = 0
    step_tokens: list[int] = field(default_factory=list)
    has_tier: bool = False

    def run(self) -> None:
        self._load()
        beat_s = time.monotonic()
        while self._drain_inbox():
            outputs = self._step()
            if outputs or time.monotonic() - beat_s > 0.2:
                beat_s = time.monotonic()
                self._send(Outputs(outputs, self._stats(), self.step_tokens))
                self.step_tokens = []
                for output in outputs:
                    self._suffer(output)
            if self.rows and self.options.step_s:
                time.sleep(self.options.step_s)

    def _load(self) -> None:
        load = self._wait_for_load()
        self._send(LoadProgress("reading weights", 0.5))
        time.sleep(self.options.load_s)
        if self.options.die_loading:
            os._exit(3)
        if self.options.fail_loading:
            self._send(LoadFailed(self.options.fail_loading, "the fake engine was told to fail"))
            sys.exit(1)
        if self.options.record:
            Path(self.options.record).write_bytes(protocol.encode_frame(load))
        self.has_tier = load.disk_tier is not None
        self._send(self._ready(load))

    def _ready(self, load: LoadModel) -> Ready:
        return Ready(
            model_type="fake",
            device="fake",
            blas="none",
            way="plain",
            weights="none",
            weights_bytes=0,
            vocab_size=self.options.vocab_size,
            context_tokens=self.options.context,
            kv_bytes_per_token=1,
            kv_limit_bytes=self.options.kv_tokens,
            kv_limit_tokens=self.options.kv_tokens,
            memory_limit_bytes=0,
            load_s=self.options.load_s,
            kv_bits=8,
            kv_format="8-bit, groups of 64",
            disk_tier=f"{load.disk_tier.folder}/fake" if load.disk_tier else "",
        )

    def _wait_for_load(self) -> LoadModel:
        while True:
            for message in self._receive(timeout_s=None) or sys.exit(0):
                if not isinstance(message, WarmUp):
                    assert isinstance(message, LoadModel)
                    return message

    def _drain_inbox(self) -> bool:
        """False where the engine shall end."""
        messages = self._receive(timeout_s=0 if self._is_busy() else 0.1)
        if messages is None:
            return False
        for message in messages:
            if isinstance(message, Shutdown):
                return False
            if isinstance(message, AddRequest):
                self._add(message)
            elif isinstance(message, Abort) and message.req_id in self.rows:
                del self.rows[message.req_id]
                ended = RequestOutput(message.req_id, [], "abort")
                self._send(Outputs([ended], self._stats()))
        return True

    def _is_busy(self) -> bool:
        return any(not self._is_silent(row) for row in self.rows.values())

    def _add(self, request: AddRequest) -> None:
        if self.options.ignores_seeds:
            request = msgspec.structs.replace(
                request, sampling=msgspec.structs.replace(request.sampling, seed=0)
            )
        seed = request.sampling.seed
        if seed == DIE:
            os._exit(9)
        if seed == HANG:
            time.sleep(3600)
        if seed == DEAF:
            self.link.close()
            time.sleep(3600)
        if seed == GARBAGE:
            self.link.sendall(LENGTH.pack(3) + b"???")
        if self.options.record_sampling:
            said = msgspec.to_builtins(Seen.of(request), str_keys=True)
            Path(self.options.record_sampling).write_text(json.dumps(said))
        self.rows[request.req_id] = Row(request, num_said=len(request.output_ids))

    def _is_silent(self, row: Row) -> bool:
        return row.seed == SILENT or (row.seed == SILENT_AFTER_TOKEN and row.num_said > 0)

    def _step(self) -> list[RequestOutput]:
        outputs = []
        active = [r for r in self.rows.values() if not self._is_silent(r)][: self.options.rows]
        if active:
            computed = (1 if row.num_said else len(row.request.prompt_ids) for row in active)
            self.step_tokens.append(sum(computed))
        for row in active:
            row.admitted_s = row.admitted_s or time.monotonic()
            outputs.append(self._say(row))
            if outputs[-1].finish_reason is not None:
                del self.rows[row.request.req_id]
        self.num_steps += bool(outputs)
        return outputs

    def _say(self, row: Row) -> RequestOutput:
        request = row.request
        if row.seed == FAIL:
            return RequestOutput(request.req_id, [], "error", error="told to fail")
        prompt = request.prompt_ids
        if request.wants_progress and row.num_computed < len(prompt):  # in two halves
            row.num_computed = min(len(prompt), row.num_computed + (len(prompt) + 1) // 2)
            return RequestOutput(request.req_id, [], num_computed_tokens=row.num_computed)
        token = prompt[row.num_said % len(prompt)]
        if self.options.eos is not None and row.num_said == len(prompt):
            token = self.options.eos
        row.num_said += 1
        self.num_tokens += 1
        reason = None
        if token in request.sampling.stop_token_ids:
            reason = "stop"
        elif row.num_said >= request.sampling.max_tokens:
            reason = "length"
        num_top, num_prompt = request.sampling.logprobs, request.sampling.prompt_logprobs
        scores = None if num_top is None else [_scores(token, num_top)]
        prompt_scores = None
        if num_prompt is not None and row.num_said == 1:
            prompt_scores = [_scores(one, num_prompt) for one in prompt[1:]]
        return RequestOutput(
            *(request.req_id, [token], reason),
            queue_s=0 if row.num_said > 1 else (row.admitted_s or 0) - row.arrival_s,
            prefill_s=0 if row.num_said > 1 else PREFILL_S,
            logprobs=scores,
            prompt_logprobs=prompt_scores,
        )

    def _suffer(self, output: RequestOutput) -> None:
        row = self.rows.get(output.req_id)
        is_first = row is not None and not row.request.output_ids
        if row is not None and row.seed == DIE_AFTER_TOKEN and is_first:
            os._exit(9)

    def _stats(self) -> EngineStats:
        live = sum(len(r.request.prompt_ids) + r.num_said for r in self.rows.values())
        running = min(len(self.rows), self.options.rows)
        return EngineStats(
            num_running=running,
            num_waiting=len(self.rows) - running,
            kv_used_bytes=live,
            kv_limit_bytes=self.options.kv_tokens,
            kv_live_tokens=live,
            num_steps_total=self.num_steps,
            num_preemptions_total=0,
            prompt_tokens_total=0,
            generation_tokens_total=self.num_tokens,
            forecast_step_s=0.001,
            prefill_tokens_per_s=1e6,
            decode_tokens_per_s=1e6,
            peak_memory_bytes=0,
            tier=numbered_tier() if self.has_tier else None,
            memory_pressure=self.options.memory_pressure,
        )

    def _send(self, message: protocol.Message) -> None:
        self.link.sendall(encode_frame(message))

    def _receive(self, timeout_s: float | None) -> list[protocol.ToEngine] | None:
        """Messages that have come; None at the end of the stream."""
        if not select.select([self.link], [], [], timeout_s)[0]:
            return []
        data = self.link.recv(1 << 20)
        if not data:
            return None
        self.buffer += data
        messages = []
        while len(self.buffer) >= LENGTH.size:
            [length] = LENGTH.unpack_from(self.buffer)
            end = LENGTH.size + length
            if len(self.buffer) < end:
                break
            messages.append(decode_to_engine(bytes(self.buffer[LENGTH.size : end])))
            del self.buffer[:end]
        return messages


def numbered_tier() -> TierStats:
    """Returns a tier each of whose numbers is another power of two, from 4 on, or True: a sum of
    them tells whether all are there."""
    powers = count(2)
    counters = TierCounters(*(1 << next(powers) for _ in TierCounters.__struct_fields__))
    hints = get_type_hints(TierStats)
    state = [hints[name] is bool or 1 << next(powers) for name in TierStats.__struct_fields__[1:]]
    return TierStats(counters, *state)


def _scores(token: int, num_top: int) -> TokenLogprobs:
    """The token itself is the likeliest, the ids after it follow."""
    ids = [token + i for i in range(num_top)]
    return TokenLogprobs(-0.5, ids, [-0.5 - i for i in range(num_top)], rank=1)


def command(**options: object) -> list[str]:
    """What a supervisor spawns: options by name, `load_s=1` for `--load-s 1`."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [sys.executable, __file__, *words]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--note-fd", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--kv-tokens", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--eos", type=int)
    parser.add_argument("--ignores-seeds", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--memory-pressure", default="normal")
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--fail-loading", default="")
    parser.add_argument("--die-loading", type=int, default=0)
    parser.add_argument("--record", default="")
    parser.add_argument("--record-sampling", default="")
    options = parser.parse_args()
    FakeEngine(socket.socket(fileno=options.fd), options).run()


if __name__ == "__main__":
    main()
