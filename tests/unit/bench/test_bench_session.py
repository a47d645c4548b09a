from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import sys
from io import StringIO
from pathlib import Path

import pytest
import typer
from fake_openai import OTHER, FakeServer, until
from rich.console import Console
from typer.testing import CliRunner

from mlx_lm_server.bench.cli import bench
from mlx_lm_server.bench.client import Target
from mlx_lm_server.bench.drivers import CALM_EVENTS
from mlx_lm_server.bench.plans import Calibration, Shape
from mlx_lm_server.bench.report import as_json, print_table
from mlx_lm_server.bench.session import (
    Outcome,
    Session,
    Settings,
    TargetUnusableError,
    calibrate,
)
from mlx_lm_server.bench.workloads import WORKLOADS

SMALL = Shape(
    prompt_tokens=16,
    output_tokens=6,
    num_requests=2,
    long_prompt_tokens=50,
    decoder_tokens=60,
    shared_tokens=20,
    turns=3,
    answer_tokens=6,
    idle_samples=2,
    busy_samples=2,
)


class Log:
    """A watcher that remembers the order of the rounds."""

    def __init__(self) -> None:
        self.rounds: list[tuple[str, int, str | None]] = []

    def round_started(self, outcome: Outcome, round_index: int) -> None:
        self.rounds.append((outcome.workload, round_index, outcome.target.model))

    def round_ended(self, outcome: Outcome) -> None:
        assert len(outcome.rounds) > 0


def settings(*workloads: str, rounds: int = 1, round_s: float = 30.0) -> Settings:
    return Settings(workloads, rounds, seed=7, shape=SMALL, silence_s=5.0, round_s=round_s)


async def run(server: FakeServer, *workloads: str, rounds: int = 1) -> Session:
    session = Session([server.target()], settings(*workloads, rounds=rounds), Log())
    await session.run()
    return session


def rendered(session: Session) -> str:
    text = StringIO()
    print_table(session, Console(file=text, width=100))
    return text.getvalue()


async def test_every_workload_runs_without_error_and_is_reported(server: FakeServer) -> None:
    session = await run(server, *WORKLOADS)
    results = as_json(session)["results"]
    assert [r["workload"] for r in results] == list(WORKLOADS)
    for result in results:
        assert result["errors"] == {}
        assert result["num_errors"] == 0
        assert result["output_tokens_per_s"] > 0
        assert result["ttft_s"]["p50"] > 0
        assert result["client_cpu_per_token_s"] > 0
    json.dumps(results)
    table = rendered(session)
    assert "one server" not in table
    assert all(name in table for name in WORKLOADS)


async def test_calibration_finds_how_the_target_counts(server: FakeServer) -> None:
    assert await calibrate(server.target(), settings()) == Calibration(2.0, 3.0)
    session = await run(server, "single")
    assert session.outcomes[0].summary.prompt_tokens == pytest.approx(2 * 16, abs=2)


async def test_rounds_of_two_targets_are_interleaved_and_ask_the_same(server: FakeServer) -> None:
    log = Log()
    targets = [server.target("a"), Target(server.url + OTHER, "b")]
    session = Session(targets, settings("single", "clients8", rounds=2), log)
    await session.run()
    expected = [
        (name, i, target)
        for name in ("single", "clients8")
        for i in range(2)
        for target in ("a", "b")
    ]
    assert log.rounds == expected
    prompts = {model: [] for model in "ab"}
    for body in server.bodies:
        prompts[body["model"]].append(body["prompt"])
    assert sorted(prompts["a"]) == sorted(prompts["b"])
    assert set(as_json(session)["ratios"]) == {"single", "clients8"}
    assert "A / B" in rendered(session)


@pytest.mark.parametrize("model", ["a", "b"])
async def test_a_server_beside_itself_is_asked_new_prompts_of_the_same_lengths(
    server: FakeServer, model: str
) -> None:
    """A server that was given the same prompts twice would have B's in its cache, and the ratios
    would be those of the cache."""
    again = Target(f"{server.url}/v1/".replace("127.0.0.1", "localhost"), model)
    session = Session([server.target("a"), again], settings("single", "mixed"), Log())
    await session.run()
    prompts = [body["prompt"] for body in server.bodies[4:]]  # after the probes
    assert len(set(prompts)) == len(prompts)
    for one in (prompts[:4], prompts[4:]):
        lengths = [len(prompt.split()) for prompt in one]
        assert sorted(lengths[: len(one) // 2]) == sorted(lengths[len(one) // 2 :])
    written = as_json(session)
    assert set(written["ratios"]) == {"single", "mixed"}
    assert [result["letter"] for result in written["results"]] == ["A", "B"] * 2
    table = " ".join(rendered(session).split())
    assert "single A" in table
    assert "single B" in table
    assert "A and B are one server" in table


async def test_newcomers_are_measured_beside_decoders_which_are_stopped(
    server: FakeServer,
) -> None:
    session = await run(server, "ttft")
    summary = session.outcomes[0].summary
    assert {"idle_ttft_p50_s", "busy_ttft_p95_s", "gap_over_itl"} <= set(summary.extras)
    assert summary.ttft_s is not None
    assert summary.ttft_s.count == SMALL.busy_samples
    decoders = [t for t in session.outcomes[0].rounds[0] if t.role == "decoder"]
    assert len(decoders) >= 8
    assert sum(t.was_stopped for t in decoders) <= 8


async def test_decoders_go_on_for_a_while_after_the_newcomer(server: FakeServer) -> None:
    long_answers = dataclasses.replace(SMALL, decoder_tokens=1000)
    given = dataclasses.replace(settings("long-prompt"), shape=long_answers)
    session = Session([server.target()], given, Log())
    await session.run()
    traces = session.outcomes[0].rounds[0]
    [end] = [t.ended_at for t in traces if t.role == "busy"]
    for decoder in (t for t in traces if t.role == "decoder"):
        assert sum(at > end for at in decoder.event_times) >= CALM_EVENTS


async def test_a_conversation_sends_the_answers_back(server: FakeServer) -> None:
    await run(server, "conversation")
    last = server.bodies[-1]["messages"]
    assert [m["role"] for m in last] == ["system", *["user", "assistant"] * 2, "user"]
    assert last[2]["content"] == "".join(f" w{i}" for i in range(SMALL.output_tokens))


async def test_a_target_that_refuses_a_probe_is_named_at_once(server: FakeServer) -> None:
    session = Session([server.target("refuses")], settings("single"), Log())
    with pytest.raises(TargetUnusableError, match="no such model"):
        await session.run()


async def test_a_target_that_wants_a_model_is_asked_for_its_first(server: FakeServer) -> None:
    server.wants_a_model = True
    session = await run(server, "single")
    assert session.outcomes[0].summary.num_errors == 0
    assert {body.get("model") for body in server.bodies[1:]} == {"listed"}


async def test_a_target_that_wants_a_model_but_lists_none_is_named(server: FakeServer) -> None:
    server.wants_a_model = True
    target = Target(f"{server.url}/nowhere")
    with pytest.raises(TargetUnusableError, match="HTTP 404"):
        await Session([target], settings("single"), Log()).run()


async def test_a_round_that_takes_too_long_is_cut_off_and_blamed(server: FakeServer) -> None:
    session = Session([server.target()], settings("clients8", round_s=0.005), Log())
    await session.run()
    summary = session.outcomes[0].summary
    assert summary.num_errors > 0
    assert "cut off" in rendered(session)


async def test_short_answers_are_told(server: FakeServer) -> None:
    session = Session([server.target("shortens")], settings("single"), Log())
    await session.run()
    assert "2 answers ended early" in rendered(session)


def command(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(bench)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


async def test_the_command_prints_a_table_and_writes_json(
    server: FakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "numbers.json"
    options = ["--workload", "single", "--rounds", "2", "--output-tokens", "4", "--seed", "3"]
    code, output = await asyncio.to_thread(
        command, "--url", server.url, *options, "--json", str(file)
    )
    assert code == 0, output
    assert "single" in output
    written = json.loads(file.read_text())
    assert written["settings"]["seed"] == 3
    assert len(written["results"][0]["rounds"]) == 2


async def test_where_stderr_is_no_terminal_a_line_says_which_round_begins(
    server: FakeServer,
) -> None:
    """And it is there while the round runs, though nobody empties a buffer."""
    code = "import typer; from mlx_lm_server.bench.cli import bench; typer.run(bench)"
    options = ("--url", server.url, "--workload", "single", "--rounds", "500", "--seed", "1")
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *options, stdout=pipe, stderr=pipe
    )
    assert child.stderr is not None
    lines = [(await asyncio.wait_for(child.stderr.readline(), 30)).decode() for _ in range(3)]
    child.send_signal(signal.SIGINT)
    output, _ = await asyncio.wait_for(child.communicate(), 10)
    assert lines == [
        "counting tokens\n",
        f"[1/500] single, round 1, A {server.url}\n",
        f"[2/500] single, round 2, A {server.url}\n",
    ]
    assert b"round" not in output, "the table is alone in its file"


async def test_the_command_fails_where_requests_fail(server: FakeServer) -> None:
    options = ["--url", server.url, "--model", "stalls", "--timeout", "0.2", "--workload", "single"]
    code, output = await asyncio.to_thread(command, *options, "--rounds", "1")
    assert code == 1
    assert "stalled" in output


async def test_an_interrupted_command_tells_what_it_has(server: FakeServer) -> None:
    code = "import typer; from mlx_lm_server.bench.cli import bench; typer.run(bench)"
    options = ("--url", server.url, "--workload", "single", "--rounds", "500")
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *options, stdout=asyncio.subprocess.PIPE
    )
    await until(lambda: len(server.bodies) > 8, limit_s=30)
    child.send_signal(signal.SIGINT)
    output, _ = await asyncio.wait_for(child.communicate(), 10)
    assert child.returncode == 1
    assert b"interrupted" in output
    assert b"single" in output


def test_a_json_file_in_no_folder_is_a_usage_error() -> None:
    code, output = command("--json", "/no/such/folder/file.json")
    assert code == 2
    assert "no folder" in output


def test_an_unknown_workload_is_a_usage_error() -> None:
    code, output = command("--workload", "nonsense")
    assert code == 2
    assert "nonsense" in output
