"""What `doctor` makes of what it finds, and what of it others may see."""

from __future__ import annotations

import os
import pwd
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_lm_server.commands.doctor import model as model_part
from mlx_lm_server.commands.doctor import surroundings
from mlx_lm_server.commands.doctor.findings import Finding, Level, note, wrong
from mlx_lm_server.commands.doctor.parity import ANSWER_TOKENS, PROMPT_TOKENS, self_test
from mlx_lm_server.commands.doctor.probed_engine import Answer, ProbedEngine
from mlx_lm_server.commands.doctor.report import (
    line_of,
    markdown,
    private_words,
    public,
    verdict,
)
from mlx_lm_server.config import Config, ModelConfig, ServerConfig, TierConfig
from mlx_lm_server.errors import EngineError
from mlx_lm_server.protocol import AddRequest, CacheReport, LoadModel, Ready, TokenLogprobs
from mlx_lm_server.runner.backends.blas import REFERENCE_BLAS

READY = Ready(
    model_type="qwen3",
    device="CPU",
    blas="OpenBLAS 1.2, 2 threads",
    weights="float32",
    weights_bytes=18_000_000,
    vocab_size=1000,
    context_tokens=4096,
    kv_bytes_per_token=100,
    kv_limit_bytes=3 * 10**9,
    memory_limit_bytes=4 * 10**9,
    load_s=1.5,
    kv_limit_tokens=5000,
    kv_format="float32",
    way="plain",
)


def ready(**changes: Any) -> Ready:
    return Ready(**{name: getattr(READY, name) for name in READY.__struct_fields__} | changes)


# ---- the self-test


class Engine:
    """Answers with numbers that follow from the prompt. `changed` changes tokens of some requests
    from a place on, where the two likeliest are `gap` apart."""

    def __init__(self, changed: str = "", place: int = 5, gap: float = 2.0) -> None:
        self.changed = changed
        self.place = place
        self.gap = gap
        self.calls: list[list[AddRequest]] = []
        self.seen: set[str] = set()

    async def __call__(self, requests: Sequence[AddRequest]) -> list[Answer]:
        self.calls.append(list(requests))
        return [self._answer(request) for request in requests]

    def _answer(self, request: AddRequest) -> Answer:
        ids = [sum(request.prompt_ids) + i for i in range(request.sampling.max_tokens)]
        if self.changed and request.req_id.startswith(self.changed):
            ids[self.place :] = [0] * (len(ids) - self.place)
        gaps = [self.gap if i == self.place else 9.0 for i in range(len(ids))]
        name = f"{request.cache_salt}: {request.prompt_ids}"
        num_cached = len(request.prompt_ids) - 1 if name in self.seen else 0
        self.seen.add(name)
        report = CacheReport(len(request.prompt_ids), num_cached, 0, 0, [], [], "", 0.0)
        return Answer(ids, [TokenLogprobs(0.0, [1, 2], [0.0, -gap]) for gap in gaps], report)


async def findings(engine: Engine, ready: Ready = READY) -> list[Finding]:
    return (await self_test(engine, ready.vocab_size)).findings(ready)


async def test_equal_tokens_are_well_and_counted() -> None:
    engine = Engine()
    batched, cached = await findings(engine)
    total = ANSWER_TOKENS * len(PROMPT_TOKENS)
    assert (batched.level, cached.level) == (Level.OK, Level.OK)
    assert f"all of {total} tokens equal" in batched.words
    found = sum(PROMPT_TOKENS) - len(PROMPT_TOKENS)
    assert f"{found} of {sum(PROMPT_TOKENS)} prompt tokens from the cache" in cached.words


async def test_alone_comes_one_by_one_and_finds_nothing_that_another_left() -> None:
    engine = Engine()
    test = await self_test(engine, 1000)
    assert sorted(map(len, engine.calls)) == [1] * 8 + [4]
    assert test.alone.num_cached_tokens == test.together.num_cached_tokens == 0


async def test_tokens_that_differ_are_wrong_and_one_is_told_what_to_do() -> None:
    batched, cached = await findings(Engine("together"))
    assert (batched.level, cached.level) == (Level.WRONG, Level.OK)
    assert "20 of 96 tokens equal" in batched.words
    assert "--max-batch-size 1" in batched.advice
    batched, cached = await findings(Engine("cached"))
    assert (batched.level, cached.level) == (Level.OK, Level.WRONG)
    assert "--no-prefix-cache" in cached.advice


@pytest.mark.parametrize(
    ("gap", "weights", "level"),
    [
        (0.1, "bfloat16", Level.NOTE),
        (2.0, "bfloat16", Level.WRONG),
        (0.1, "float32", Level.WRONG),
        (0.0, "float32", Level.NOTE),
    ],
)
async def test_rounding_may_decide_between_tokens_that_are_as_likely(
    gap: float, weights: str, level: Level
) -> None:
    batched, _ = await findings(Engine("together", gap=gap), ready(weights=weights))
    assert batched.level is level


# ---- what an engine says of itself


def test_a_slow_blas_is_wrong() -> None:
    assert model_part.device(READY).level is Level.OK
    found = model_part.device(ready(blas=REFERENCE_BLAS))
    assert found.level is Level.WRONG
    assert "cpu" in found.advice


def test_how_a_model_is_batched_comes_with_the_reason() -> None:
    assert model_part.runs(READY).level is Level.OK
    found = model_part.runs(ready(batching="alone", batching_reason="it keeps state of its own"))
    assert found.level is Level.NOTE
    assert "alone" in found.words
    assert found.words.endswith(": it keeps state of its own")


def test_memory_that_holds_no_whole_row_is_noted() -> None:
    assert model_part.memory(READY).level is Level.OK
    found = model_part.memory(ready(kv_limit_tokens=1000))
    assert found.level is Level.NOTE
    assert "at most 1000" in found.words


async def test_an_engine_that_ends_is_told_with_how() -> None:
    command = (sys.executable, "-c", "import sys; sys.exit(3)")
    with pytest.raises(EngineError, match=r"ended while it loaded the model \(exit code 3\)"):
        async with ProbedEngine(command) as engine:
            await engine.load(LoadModel("/nowhere"))


async def test_an_engine_that_cannot_be_started_is_told() -> None:
    with pytest.raises(EngineError, match="cannot be started"):
        async with ProbedEngine(("/no/such/program",)):
            pass


# ---- surroundings


def test_a_port_that_somebody_has_is_wrong(unused_tcp_port_of: socket.socket) -> None:
    port = unused_tcp_port_of.getsockname()[1]
    found = surroundings.port(ServerConfig(port=port))
    assert found.level is Level.WRONG
    assert "--port" in found.advice
    unused_tcp_port_of.close()
    assert surroundings.port(ServerConfig(port=port)).level is Level.OK


@pytest.fixture
def unused_tcp_port_of() -> Any:
    """Listens and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken


def test_a_disk_is_measured_and_nothing_left_there(tmp_path: Path) -> None:
    found = surroundings.disk_tier(TierConfig(ssd_cache_dir=str(tmp_path / "not" / "there")))
    assert "MB a second read" in found.words
    assert list(tmp_path.iterdir()) == []
    assert surroundings.disk_tier(TierConfig(no_ssd=True)).level is Level.OK


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_nobody_may_write_to_is_wrong(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert surroundings.disk_tier(TierConfig(ssd_cache_dir=str(tmp_path))).level is Level.WRONG


def test_this_machine_and_its_packages_are_named() -> None:
    assert "GB of memory" in surroundings.machine().words
    assert "mlx-lm " in surroundings.versions().words
    assert surroundings.open_files().level in Level


# ---- lines and reports


def test_a_finding_is_one_line_with_what_to_do() -> None:
    text = line_of(wrong("port", "it is taken", "choose another")).plain
    assert " ".join(text.split()) == "wrong port it is taken → choose another"
    assert verdict([note("a", "b"), Finding("c", "d")]) == "all is well"
    assert verdict([wrong("a", "b", "c")] * 2) == "2 things are wrong"


def test_a_report_is_a_table() -> None:
    text = markdown([wrong("port", "a | b\nc", "choose")], [])
    assert text.startswith("mlx-lm-server ")
    assert text.endswith("| wrong | port | a / b c | choose |\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--model /home/jo/m: no such folder", "--model …: no such folder"),
        ("in '~/models/x' and ~jo/y", "in '…' and …"),
        ("./x/y, ../z and a/b/c.safetensors", "…, … and …"),
        ("see http://10.0.0.1:80/x now", "see … now"),
        ("org/name, 5 MB a second and/or 0.3.4.5", "org/name, 5 MB a second and/or 0.3.4.5"),
        ("FILE=/etc/x(/etc/y)", "FILE=…(…)"),
        ("jo at Jo's joke box.local", "… at …'s joke …"),
        ("/Users/Jo Doe/models is no folder", "…… is no folder"),
    ],
)
def test_paths_addresses_and_private_words_are_left_out(text: str, shown: str) -> None:
    assert public(text, ["jo", "box.local", "/Users/Jo Doe"]) == shown


def test_names_of_user_and_host_and_all_keys_are_private(tmp_path: Path) -> None:
    config = replace(
        Config(),
        server=ServerConfig(host="192.0.2.1", api_key="sk-1"),
        model=ModelConfig(model=str(tmp_path)),
    )
    environment = {"USER": "someone", "HF_TOKEN": "hf_123456", "HOME": "/", "LANG": "C"}
    words = private_words(config, environment)
    entry = pwd.getpwuid(os.getuid())
    for word in ("someone", "hf_123456", "sk-1", "192.0.2.1", str(tmp_path), entry.pw_name,
                 socket.gethostname()):  # fmt: skip
        assert word in words
    assert "/" not in words
    assert "C" not in words


def test_a_model_of_the_hub_is_named_and_a_folder_is_not(tmp_path: Path) -> None:
    assert model_part.shown_name("nano") == "nano"
    assert model_part.shown_name("org/name") == "org/name"
    assert model_part.shown_name(str(tmp_path)) == "a local folder"
