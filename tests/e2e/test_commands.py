"""`chat`, `top` and `doctor` as they are started, with a real server beside them."""

from __future__ import annotations

import getpass
import io
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_lm_server.cli import main
from tests.e2e.conftest import Nano
from tests.terminals import LIMIT_S, PROGRAM, AtTerminal


def run(*arguments: str, typed: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        input=typed,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=os.environ | environment,
    )


def test_in_a_pipe_each_line_gets_an_answer_and_nothing_else_is_written(nano: Nano) -> None:
    typed = "Count from 3 to 5.\n/clear\nWhat is 2 + 3?\n"
    done = run("chat", "--url", nano.url, "--temperature", "0", typed=typed)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == "3, 4, 5"
    assert "5" in second


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("chat --url SERVER --model nope", 1, "does not exist"),
        ("chat --url http://127.0.0.1:1", 1, "nobody answers"),
        ("top --once --url http://127.0.0.1:1", 1, "nobody answers"),
        ("top --url ftp://x", 2, "is no address"),
        ("chat --temperature hot", 2, "--temperature"),
        ("doctor --config /not/there.toml", 2, "/not/there.toml"),
    ],
)
def test_what_does_not_work_is_one_line_and_an_exit_code(
    nano: Nano,
    arguments: str,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    with pytest.raises(SystemExit) as ended:
        main(arguments.replace("SERVER", nano.url).split())
    output, complaint = capsys.readouterr()
    assert (ended.value.code, output) == (code, "")
    assert words in complaint
    assert complaint.count("\n") == 1


def test_at_a_terminal_ctrl_c_stops_the_answer_and_arrows_bring_lines_back(nano: Nano) -> None:
    chat = AtTerminal("chat", "--url", nano.url, "--temperature", "0")
    chat.wait_for("nano at http.*leaves")
    chat.type("Count from 1 to 95.\r")
    chat.wait_for("1, 2, 3")
    chat.interrupt()
    chat.wait_for("stopped")
    wait_until(nano.is_idle)
    chat.type("What is 2 + 3?\r")
    chat.wait_for(r"tokens.*the first after")
    chat.type("\x1b[A")
    chat.wait_for(r"What is 2 \+ 3\?")
    chat.interrupt()
    chat.wait_for("/exit leaves")
    chat.type("/exit\r")
    assert chat.exit_code() == 0


def test_thinking_is_dim(nano: Nano) -> None:
    chat = AtTerminal("chat", "--url", nano.url, "--temperature", "0", "--think")
    chat.wait_for("leaves")
    chat.type("What is 2 + 3?\r")
    chat.wait_for("\x1b\\[2mOnes")
    chat.wait_for("tokens.*\r\n.*> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_one_frame_goes_through_a_pipe(nano: Nano) -> None:
    done = run("top", "--once", "--url", nano.url, "--interval", "0.2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nano  ok" in done.stdout
    assert "of 32" in done.stdout
    assert f"pid {nano.engine().pid}" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_report_says_that_all_is_well_and_nothing_private(port: int, tmp_path: Path) -> None:
    secret = "a-secret-that-nobody-may-see"
    done = run(
        "doctor",
        "--report",
        MLX_LM_SERVER_PORT=str(port),
        MLX_LM_SERVER_API_KEY=secret,
        MLX_LM_SERVER_SSD_CACHE_DIR=str(tmp_path),
        HF_TOKEN=secret,
    )
    assert done.returncode == 0, done.stderr
    assert "| ok | batched as alone | all of 96 tokens equal" in done.stdout
    assert "| ok | cached as cold | all of 96 tokens equal" in done.stdout
    assert re.search(r"\| ok \| runs \| packed, way \w+, submitted late", done.stdout)
    for private in (secret, str(tmp_path), socket.gethostname(), getpass.getuser()):
        assert private not in done.stdout


def test_what_is_wrong_is_named_with_what_to_do_and_the_exit_code_is_1(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = run("doctor", "--model", str(tmp_path), MLX_LM_SERVER_NO_SSD="true")
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("wrong ")]
    assert " → " in line
    assert "1 thing is wrong" in done.stdout


def wait_until(is_so: object) -> None:
    ends_s = time.monotonic() + LIMIT_S
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < ends_s
        time.sleep(0.02)
