"""The command line tool `llm`, with the model file that docs/guides/clients.md shows.

Runs where it is installed, which the extra `eval` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Nano

pytest.importorskip("llm")
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "clients.md"
TOOL = """
def get_weather(city: str) -> str:
    "Get the weather of a city"
    return '{"temperature": 21, "condition": "sunny"}'
"""
Ask = Callable[..., str]


@pytest.fixture
def ask(nano: Nano, tmp_path: Path) -> Ask:
    models = GUIDE.read_text().partition("```yaml\n")[2].partition("```")[0]
    models = models.replace("http://127.0.0.1:8000", nano.url)
    (tmp_path / "extra-openai-models.yaml").write_text(models)

    def run(*arguments: str, text: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("how", [(), ("--no-stream",)])
def test_a_question(ask: Ask, how: tuple[str, ...]) -> None:
    assert "7" in ask("-m", "local", "What is 3 + 4?", "-o", "temperature", "0", *how)


def test_a_text_goes_on(ask: Ask) -> None:
    options = ("-o", "temperature", "0", "-o", "max_tokens", "8", "-o", "logprobs", "2")
    assert ask("-m", "local-text", "One two three", *options).strip()


def test_a_tool_is_called(ask: Ask) -> None:
    question = "What is the weather in Madrid?"
    options = ("-o", "temperature", "0", "-o", "max_tokens", "60")
    assert "21" in ask("-m", "local", "--functions", TOOL, question, *options)


def test_a_chat(ask: Ask) -> None:
    said = ask("chat", "-m", "local", "-o", "temperature", "0", text="What is 2 + 2?\nquit\n")
    assert "4" in said
