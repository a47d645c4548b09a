"""The corpus is repeatable, keeps held-out prompts out, and looks as the chat template renders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from training.chat import Style, conversation_parts
from training.exchange import Exchange, draw
from training.skills import SKILLS

jinja2 = pytest.importorskip("jinja2")
TEMPLATE = Path(__file__).parents[2] / "src" / "mlx_lm_server" / "nano" / "chat_template.jinja"


def render(messages: list[dict[str, Any]], **variables: Any) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(TEMPLATE.read_text())
    return str(template.render(messages=messages, **variables))


def joined(exchanges: list[Exchange], style: Style) -> str:
    first = exchanges[0]
    parts = conversation_parts(exchanges, first.system, first.tools, style)
    return "".join(part.text for group in parts for part in group)


def messages_of(exchanges: list[Exchange]) -> list[dict[str, Any]]:
    system = exchanges[0].system
    head = [{"role": "system", "content": system}] if system else []
    return head + [message for exchange in exchanges for message in exchange.messages]


@pytest.mark.parametrize("skill", sorted(SKILLS))
def test_the_same_seed_gives_the_same_exchanges(skill: str) -> None:
    first = [draw(SKILLS[skill], random.Random(7), "train") for _ in range(5)]
    again = [draw(SKILLS[skill], random.Random(7), "train") for _ in range(5)]
    assert first == again


@pytest.mark.parametrize("skill", sorted(SKILLS))
def test_training_exchanges_are_never_held_out(skill: str) -> None:
    rng = random.Random(3)
    trained = {draw(SKILLS[skill], rng, "train").key for _ in range(50)} - {""}
    held_out = {draw(SKILLS[skill], rng, "held_out").key for _ in range(50)} - {""}
    assert not trained & held_out


@pytest.mark.parametrize("skill", sorted(SKILLS))
def test_a_conversation_reads_as_the_template_renders_it(skill: str) -> None:
    rng = random.Random(11)
    for _ in range(10):
        exchanges = [draw(SKILLS[skill], rng, "train"), draw(SKILLS["sum"], rng, "train")]
        prompt = render(
            messages_of(exchanges)[:-1], tools=exchanges[0].tools, add_generation_prompt=True
        )
        expected = f"{prompt}{exchanges[-1].answer}<|im_end|>\n"
        assert joined(exchanges, Style()) == expected


def test_thinking_leaves_the_generation_prompt_open() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    prompt = render(messages, add_generation_prompt=True, enable_thinking=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_reasoning_of_earlier_turns_is_left_out() -> None:
    answer = "<think>\nsecret\n</think>\n\nHello!"
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Bye"},
    ]
    assert "secret" not in render(messages)
    assert "Hello!" in render(messages)
