"""Where a conversation is typed and shown: a terminal, or pipes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol

from rich.console import Console
from rich.text import Text

from mlx_lm_server.commands.chat.answers import Piece
from mlx_lm_server.commands.chat.conversation import joined

PROMPT, GOES_ON = "> ", "… "
LEAVING = "Ctrl-D or /exit leaves"
# An answer must not move the cursor, rename the window or write to the clipboard.
CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Screen(Protocol):
    """What a conversation needs of where it takes place."""

    is_interactive: bool

    def lines(self) -> Iterator[str]:
        """Yields what is typed, until there is no more."""
        ...

    def show(self, piece: Piece) -> None:
        """Shows some more of an answer at once."""
        ...

    def end(self) -> None:
        """Ends the line of an answer."""
        ...

    def tell(self, words: str) -> None:
        """Says something beside the answers."""
        ...

    def complain(self, words: str) -> None:
        """Says what went wrong."""
        ...


class Terminal:
    """Lines are edited by readline, whose arrow keys bring back earlier ones. Thinking is dim."""

    is_interactive = True

    def __init__(self, console: Console | None = None) -> None:
        # The import alone makes input() edit lines; Pythons without it still read them.
        with suppress(ImportError):
            import readline  # noqa: F401
        self._console = console or Console(highlight=False)
        self._was_thought = False
        self._is_line_open = False

    def lines(self) -> Iterator[str]:
        """Ctrl-C drops the line that is being typed, Ctrl-D ends."""
        begun: list[str] = []
        while True:
            try:
                begun.append(input(GOES_ON if begun else PROMPT))
            except KeyboardInterrupt:
                begun.clear()
                self.end()
                self.tell(f"\n{LEAVING}")
                continue
            except EOFError:
                self._console.print()
                return
            if not begun[-1].endswith("\\"):
                yield joined(begun)
                begun.clear()

    def show(self, piece: Piece) -> None:
        text = piece.text.translate(CONTROLS)
        if self._was_thought and not piece.is_thought:
            self._print("\n\n" if self._is_line_open else "\n")
            text = text.lstrip("\n")
        self._was_thought = piece.is_thought
        self._print(text, "dim" if piece.is_thought else "")

    def _print(self, text: str, style: str = "") -> None:
        if text:
            self._console.print(Text(text, style=style), end="", soft_wrap=True)
            self._is_line_open = not text.endswith("\n")

    def end(self) -> None:
        if self._is_line_open:
            self._print("\n")
        self._was_thought = False

    def tell(self, words: str) -> None:
        self._console.print(Text(words.translate(CONTROLS), style="dim"), soft_wrap=True)

    def complain(self, words: str) -> None:
        self._console.print(Text(words.translate(CONTROLS), style="red"), soft_wrap=True)


class Pipes:
    """Reads messages from a pipe, one a line, and writes nothing but answers: no prompt, no
    thinking. Complaints go to stderr."""

    is_interactive = False

    def __init__(self) -> None:
        self._is_line_open = False

    def lines(self) -> Iterator[str]:
        begun: list[str] = []
        for line in sys.stdin:
            begun.append(line.rstrip("\r\n"))
            if not begun[-1].endswith("\\"):
                yield joined(begun)
                begun.clear()
        if begun:
            yield joined(begun)

    def show(self, piece: Piece) -> None:
        if not piece.is_thought:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            self._is_line_open = not piece.text.endswith("\n")

    def end(self) -> None:
        if self._is_line_open:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._is_line_open = False

    def tell(self, words: str) -> None:
        """Nobody is there to read it."""

    def complain(self, words: str) -> None:
        sys.stderr.write(f"mlx-lm-server: {words}\n")
