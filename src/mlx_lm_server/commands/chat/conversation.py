"""What has been said, and what a line that somebody types means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Message = dict[str, str]
COMMANDS = ("/clear", "/exit", "/help", "/system")
HELP = (
    "/clear          forget what was said\n"
    "/system TEXT    a system message from here on; without a text, none\n"
    "/exit           leave, as Ctrl-D does\n"
    "//…             a message that begins with a slash\n"
    "… \\             goes on in the next line\n"
    "Ctrl-C          stops an answer"
)


@dataclass
class Conversation:
    """Owned by the command's only thread. Questions and answers take turns, as templates want."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """Returns all of it as the API takes it."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def settle(self, answer: str) -> None:
        """Keeps an answer, whole or stopped; a question that got none is taken back."""
        if answer:
            self.turns.append({"role": "assistant", "content": answer})
        elif self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def clear(self) -> None:
        self.turns.clear()


@dataclass(frozen=True)
class Line:
    """What a line asks for, and the text that goes with it."""

    kind: Literal["say", "nothing", "clear", "exit", "help", "system", "unknown"]
    text: str = ""


def read_line(line: str) -> Line:
    """Returns what one line, or several that belong together, means."""
    text = line.strip()
    if not text:
        return Line("nothing")
    if text.startswith("//"):
        return Line("say", text[1:])
    if not text.startswith("/"):
        return Line("say", text)
    word, _, rest = text.partition(" ")
    match word:
        case "/clear":
            return Line("clear")
        case "/exit" | "/quit":
            return Line("exit")
        case "/help":
            return Line("help")
        case "/system":
            return Line("system", rest.strip())
        case _:
            return Line("unknown", f"{word} is none of {', '.join(COMMANDS)}; //… says it")


def joined(lines: Sequence[str]) -> str:
    """Returns lines of which all but the last end with a backslash as one text."""
    return "\n".join(line.removesuffix("\\") for line in lines)
