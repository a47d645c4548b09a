"""The loop of a conversation: a line, its answer, the next line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from time import perf_counter

from mlx_lm_server.commands.chat.answers import End, Stream
from mlx_lm_server.commands.chat.conversation import HELP, Conversation, read_line
from mlx_lm_server.commands.chat.screens import Screen
from mlx_lm_server.commands.running_server import RefusedError, UnreachableError

Ask = Callable[[list[dict[str, str]]], Stream]


def talk(conversation: Conversation, screen: Screen, ask: Ask) -> int:
    """Returns the exit code. Somebody at a terminal sees what went wrong and goes on; in a pipe the
    first failure ends it, since what follows would answer something else."""
    for typed in screen.lines():
        line = read_line(typed)
        match line.kind:
            case "exit":
                return 0
            case "clear":
                conversation.clear()
                screen.tell("forgotten")
            case "system":
                conversation.system = line.text or None
                screen.tell("noted" if line.text else "no system message")
            case "help":
                screen.tell(HELP)
            case "unknown":
                screen.complain(line.text)
                if not screen.is_interactive:
                    return 1
            case "say":
                if not _answer(line.text, conversation, screen, ask):
                    return 1
            case "nothing":
                pass
    return 0


def _answer(text: str, conversation: Conversation, screen: Screen, ask: Ask) -> bool:
    """Shows and keeps one answer; tells whether to go on."""
    conversation.ask(text)
    said: list[str] = []
    begun_s = perf_counter()
    first_s: float | None = None
    goes_on = True
    end = End()
    try:
        with closing(ask(conversation.messages())) as pieces:
            for piece in pieces:
                if isinstance(piece, End):
                    end = piece
                    continue
                first_s = first_s or perf_counter()
                if not piece.is_thought:
                    said.append(piece.text)
                screen.show(piece)
        screen.end()
        screen.tell(_summary(end, begun_s, first_s, perf_counter()))
    except KeyboardInterrupt:
        screen.end()
        screen.tell("stopped")
        goes_on = screen.is_interactive
    except (RefusedError, UnreachableError) as error:
        screen.end()
        screen.complain(str(error))
        goes_on = screen.is_interactive
    conversation.settle("".join(said))
    return goes_on


def _summary(end: End, begun_s: float, first_s: float | None, now_s: float) -> str:
    """`20 tokens, 53 a second, the first after 0.12 s`, as far as it is known."""
    parts = []
    if end.num_tokens:
        parts.append(f"{end.num_tokens} tokens")
        if first_s is not None and end.num_tokens > 1 and now_s > first_s:
            parts.append(f"{(end.num_tokens - 1) / (now_s - first_s):.0f} a second")
    if first_s is not None:
        parts.append(f"the first after {first_s - begun_s:.2f} s")
    if end.reason == "length":
        parts.append("cut off by its limit")
    return ", ".join(parts) or "nothing was said"
