"""Scores a model folder on held-out prompts of each skill, greedily, with mlx-lm.

`python -m training.score` prints the table of training/README.md; `--draft FOLDER` adds how many
of the tokens that the draft proposes (4 at a time) the model accepts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import batch_generate, load
from mlx_lm.models.cache import make_prompt_cache

from .chat import AFTER_TOOL_THOUGHT, assistant_text
from .exchange import Exchange, Message, draw
from .skills import SKILLS

NANO_FOLDER = Path(__file__).parents[1] / "src" / "mlx_lm_server" / "nano"
DRAFT_LENGTH = 4
BATCH_ROWS = 16
TRIES = 20
SHORT_WORDS = 40
ACCEPTANCE_PROBES = 20
END_OF_THOUGHT = "</think>\n\n"


@dataclass(frozen=True)
class Probe:
    """A prompt and the text that the model should write."""

    skill: str
    prompt: list[int]
    expected: str
    also: tuple[str, ...] = ()
    is_free: bool = False  # judged by its form, since there is no single right answer


@dataclass(frozen=True)
class Answer:
    """What the model wrote, without the end mark."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Acceptance:
    """Draft tokens proposed and accepted."""

    proposed: int
    accepted: int


def probes_of(skill: str, tokenizer: Any, count: int, thinking: bool) -> list[Probe]:
    """Up to `count` distinct held-out prompts; fewer where the skill has no more."""
    rng = random.Random(f"score {skill}")
    probes: dict[tuple[int, ...], Probe] = {}
    for _ in range(TRIES * count):
        if len(probes) >= count:
            break
        exchange = draw(SKILLS[skill], rng, "held_out")
        for probe in _exchange_probes(exchange, tokenizer, thinking):
            probes.setdefault(tuple(probe.prompt), probe)
    return list(probes.values())


def _exchange_probes(exchange: Exchange, tokenizer: Any, thinking: bool) -> Iterator[Probe]:
    """One probe for each assistant message."""
    head: list[Message] = [{"role": "system", "content": exchange.system}] * bool(exchange.system)
    for i, message in enumerate(exchange.messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            head + list(exchange.messages[:i]),
            tools=list(exchange.tools) or None,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        thought = AFTER_TOOL_THOUGHT if i > 1 else exchange.thought
        prefix = f"<think>\n{thought}\n</think>\n\n" if thinking else ""
        yield Probe(
            _label(exchange, i),
            list(prompt),
            prefix + assistant_text(message),
            tuple(prefix + text for text in exchange.also),
            exchange.skill == "story",
        )


def _label(exchange: Exchange, index: int) -> str:
    if exchange.skill == "repeat":
        is_long = len(exchange.answer.split()) > SHORT_WORDS
        return (
            f"repeat, {SHORT_WORDS + 1} to 150 words"
            if is_long
            else f"repeat, to {SHORT_WORDS} words"
        )
    if exchange.skill == "tool":
        return "tool: use its result" if index > 1 else "tool: call"
    return exchange.skill


def answers(model: Any, tokenizer: Any, probes: list[Probe]) -> list[Answer]:
    """Greedy answers, in batches of prompts of like length."""
    order = sorted(range(len(probes)), key=lambda i: len(probes[i].prompt))
    out: dict[int, Answer] = {}
    for start in range(0, len(order), BATCH_ROWS):
        rows = order[start : start + BATCH_ROWS]
        limits = [_limit(tokenizer, probes[i]) for i in rows]
        prompts = [probes[i].prompt for i in rows]
        answered = batch_generate(
            model, tokenizer, prompts, max_tokens=limits, return_token_ids=True
        )
        for i, text, ids in zip(rows, answered.texts, answered.token_ids, strict=True):
            out[i] = Answer(text, list(ids))
    return [out[i] for i in range(len(probes))]


def _limit(tokenizer: Any, probe: Probe) -> int:
    """A few tokens more than are needed, so that not stopping is seen."""
    return 300 if probe.is_free else len(tokenizer.encode(probe.expected)) + 8


def is_right(probe: Probe, answer: Answer) -> bool:
    """Exact, but for stories, which must begin (after some thought), end and stop like one."""
    if probe.is_free:
        thought, end_of_thought, story = answer.text.rpartition(END_OF_THOUGHT)
        is_thinking = END_OF_THOUGHT in probe.expected
        is_story = story.startswith("Once upon a time") and story.endswith("The end.")
        return is_story and bool(end_of_thought) == is_thinking == thought.startswith("<think>")
    return answer.text == probe.expected or answer.text in probe.also


def acceptance(draft: Any, prompt: list[int], output: list[int]) -> Acceptance:
    """Replays a greedy output: at each step the draft proposes, and what agrees is accepted."""
    proposed = accepted = at = 0
    stream = prompt + output
    while at < len(output):
        window = min(DRAFT_LENGTH, len(output) - at)
        guess = _greedy(draft, stream[: len(prompt) + at], window)
        agreed = 0
        while agreed < window and guess[agreed] == output[at + agreed]:
            agreed += 1
        proposed, accepted = proposed + window, accepted + agreed
        at += agreed + 1
    return Acceptance(proposed, accepted)


def _greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    cache = make_prompt_cache(model)
    current, out = mx.array([tokens]), []
    for _ in range(count):
        token = int(mx.argmax(model(current, cache=cache)[0, -1]))
        out.append(token)
        current = mx.array([[token]])
    return out


def acceptance_of(draft: Any, probes: Iterable[Probe], answered: Iterable[Answer]) -> float:
    """Share of proposed tokens that the model would have drawn itself."""
    parts = [
        acceptance(draft, probe.prompt, answer.ids)
        for probe, answer in zip(probes, answered, strict=True)
    ]
    return sum(p.accepted for p in parts) / max(1, sum(p.proposed for p in parts))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=NANO_FOLDER)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--count", type=int, default=100, help="held-out prompts per skill")
    parser.add_argument("--skills", nargs="*", default=list(SKILLS), choices=list(SKILLS))
    parser.add_argument("--thinking", action="store_true", help="score with thinking on")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per skill")
    return parser.parse_args()


def show_wrong(probes: list[Probe], answered: list[Answer], most: int) -> None:
    """Print some wrong answers beside what was expected."""
    wrong = [(p, a) for p, a in zip(probes, answered, strict=True) if not is_right(p, a)]
    for probe, answer in wrong[:most]:
        print(json.dumps({"expected": probe.expected, "got": answer.text}, ensure_ascii=False))


def main() -> None:
    """Print one line per skill."""
    args = parse()
    model, tokenizer = load(str(args.model))[:2]
    draft = load(str(args.draft))[0] if args.draft else None
    print("| skill | prompts | right |" + (" accepted |" if draft else ""))
    print("|---|---|---|" + ("---|" if draft else ""))
    for skill in args.skills:
        probes = probes_of(skill, tokenizer, args.count, args.thinking)
        answered = answers(model, tokenizer, probes)
        for label in sorted({probe.skill for probe in probes}):
            pairs = [(p, a) for p, a in zip(probes, answered, strict=True) if p.skill == label]
            print(table_line(label, pairs, draft), flush=True)
        show_wrong(probes, answered, args.show)


def table_line(label: str, pairs: list[tuple[Probe, Answer]], draft: Any) -> str:
    """One line of the table; acceptance is taken from the first few prompts."""
    right = sum(is_right(probe, answer) for probe, answer in pairs) / len(pairs)
    line = f"| {label} | {len(pairs)} | {right:.0%} |"
    if draft is None:
        return line
    some = pairs[:ACCEPTANCE_PROBES]
    share = acceptance_of(draft, [p for p, _ in some], [a for _, a in some])
    return f"{line} {share:.0%} |"


if __name__ == "__main__":
    main()
