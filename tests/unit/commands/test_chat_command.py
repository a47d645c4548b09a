"""A conversation without a server: what lines mean, what an event stream says, what is kept."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from rich.console import Console

from mlx_lm_server.commands.chat.answers import End, Piece, Stream, pieces_of
from mlx_lm_server.commands.chat.conversation import Conversation, Line, joined, read_line
from mlx_lm_server.commands.chat.screens import Pipes, Terminal
from mlx_lm_server.commands.chat.talk import talk
from mlx_lm_server.commands.running_server import RefusedError, UnreachableError


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("hello there", Line("say", "hello there")),
        ("   ", Line("nothing")),
        ("/clear", Line("clear")),
        ("/exit", Line("exit")),
        ("/quit", Line("exit")),
        ("/help", Line("help")),
        ("/system Be brief.", Line("system", "Be brief.")),
        ("/system", Line("system")),
        ("//etc is a folder", Line("say", "/etc is a folder")),
        ("a\n/clear", Line("say", "a\n/clear")),
    ],
)
def test_a_line_means_what_it_begins_with(typed: str, line: Line) -> None:
    assert read_line(typed) == line


def test_an_unknown_command_is_no_message() -> None:
    line = read_line("/clera now")
    assert line.kind == "unknown"
    assert "/clera is none of /clear, /exit" in line.text


def test_lines_with_a_backslash_go_on() -> None:
    assert joined(["one \\", "two\\", "three"]) == "one \ntwo\nthree"


# ---- event streams


def events(*payloads: str) -> bytes:
    return b"".join(f"data: {payload}\n\n".encode() for payload in payloads)


def delta(text: str) -> str:
    return f'{{"choices":[{{"delta":{{{text}}},"finish_reason":null}}]}}'


def test_thoughts_and_words_come_apart_and_the_end_last() -> None:
    data = events(
        delta('"role":"assistant","content":""'),
        delta('"reasoning_content":"hm"'),
        delta('"content":"yes"'),
        '{"choices":[{"delta":{},"finish_reason":"stop"}]}',
        '{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}',
        "[DONE]",
    )
    cut = [b": keep-alive\n\n", *(data[i : i + 7] for i in range(0, len(data), 7))]
    assert list(pieces_of(iter(cut))) == [Piece("hm", True), Piece("yes"), End("stop", 2)]


def test_a_stream_that_ends_early_broke_off() -> None:
    with pytest.raises(UnreachableError, match="broke off"):
        list(pieces_of(iter([events(delta('"content":"ye"'))])))


def test_an_error_within_a_stream_is_one_line() -> None:
    with pytest.raises(RefusedError, match=r"^the engine ended$"):
        list(pieces_of(iter([events('{"error":{"message":"the engine\\nended"}}')])))


def test_what_is_no_json_is_told() -> None:
    with pytest.raises(UnreachableError, match="no answer"):
        list(pieces_of(iter([events("{")])))


# ---- the loop


@dataclass
class Script:
    """A screen on which lines are typed as they are listed."""

    typed: list[str]
    is_interactive: bool = True
    shown: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        yield from self.typed

    def show(self, piece: Piece) -> None:
        self.shown.append(piece.text)

    def end(self) -> None:
        self.shown.append("\n")

    def tell(self, words: str) -> None:
        self.told.append(words)

    def complain(self, words: str) -> None:
        self.complaints.append(words)


@dataclass
class Model:
    """Answers `echo: …` to all but some messages; keeps what it was asked."""

    asked: list[list[dict[str, str]]] = field(default_factory=list)
    num_closed: int = 0

    def __call__(self, messages: list[dict[str, str]]) -> Stream:
        self.asked.append(list(messages))
        return self._answer(messages[-1]["content"])

    def _answer(self, text: str) -> Stream:
        try:
            if text == "fail":
                raise RefusedError("no", 503)
            yield Piece("thinking", is_thought=True)
            yield Piece("echo: ")
            if text == "stop me":
                raise KeyboardInterrupt
            yield Piece(text)
            yield End("stop", 3)
        finally:
            self.num_closed += 1


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_what_was_said_goes_with_the_next_message_and_thoughts_do_not() -> None:
    model, screen = Model(), Script(["a", "b", "/clear", "c"])
    assert talk(Conversation("Be brief."), screen, model) == 0
    assert [contents(messages) for messages in model.asked] == [
        ["Be brief.", "a"],
        ["Be brief.", "a", "echo: a", "b"],
        ["Be brief.", "c"],
    ]
    assert "3 tokens" in screen.told[0]


def test_the_system_message_can_be_changed_and_left_out() -> None:
    model = Model()
    talk(Conversation(), Script(["/system Be kind.", "a", "/system", "b"]), model)
    assert contents(model.asked[0])[0] == "Be kind."
    assert contents(model.asked[1])[0] == "a"


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on_with_what_was_said() -> None:
    model, screen = Model(), Script(["stop me", "b"])
    assert talk(Conversation(), screen, model) == 0
    assert "stopped" in screen.told
    assert model.num_closed == 2
    assert contents(model.asked[1]) == ["stop me", "echo: ", "b"]


def test_a_question_without_an_answer_is_taken_back() -> None:
    model, screen = Model(), Script(["fail", "b"])
    assert talk(Conversation(), screen, model) == 0
    assert screen.complaints == ["no"]
    assert contents(model.asked[1]) == ["b"]


@pytest.mark.parametrize("line", ["fail", "/nonsense", "stop me"])
def test_in_a_pipe_the_first_failure_ends_it(line: str) -> None:
    model = Model()
    assert talk(Conversation(), Script([line, "b"], is_interactive=False), model) == 1
    assert all("b" not in contents(messages) for messages in model.asked)


def test_nothing_is_asked_after_exit() -> None:
    model = Model()
    assert talk(Conversation(), Script(["/exit", "a"]), model) == 0
    assert model.asked == []


# ---- screens


def test_thoughts_are_dim_and_an_answer_cannot_move_the_cursor() -> None:
    output = io.StringIO()
    terminal = Terminal(Console(file=output, force_terminal=True, color_system="standard"))
    for piece in (Piece("hm", True), Piece("\n\nyes [bold]\x1b[2J\x07\x9b1"), Piece(" no")):
        terminal.show(piece)
    terminal.end()
    assert output.getvalue() == "\x1b[2mhm\x1b[0m\n\nyes [bold][2J1 no\n"


def test_a_pipe_gets_answers_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one \\\r\ntwo\nthree\\"))
    pipes = Pipes()
    assert list(pipes.lines()) == ["one \ntwo", "three"]
    for piece in (Piece("hm", True), Piece("yes"), Piece(" no")):
        pipes.show(piece)
    pipes.end()
    pipes.tell("never mind")
    pipes.complain("oh")
    assert tuple(capsys.readouterr()) == ("yes no\n", "mlx-lm-server: oh\n")
