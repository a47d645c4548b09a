"""A model's text → what its client gets of it: taken apart, and ended at the first stop string.

Stop strings are sought in the content, as the client gets it: not in the reasoning (but where the
request wants that), not in marks, and not in calls. So they are sought after the parser, which
gives content later than it gets it: white space at a border is held, and so is what may begin a
mark. Where in the text the content ends is therefore told here:

    text of the tokens   ……settled……│…held by the stop strings…│…held by the parser…│
                                    └──────────────── unsettled ────────────────────┘
"""

from __future__ import annotations

from mlx_lm_server.parsing.message import MessageDelta
from mlx_lm_server.parsing.message_parser import MessageParser
from mlx_lm_server.parsing.stop_strings import StopStrings
from mlx_lm_server.server.answers.generate_request import GenerateRequest

# So much that is neither content nor reasoning is no beginning of one.
MAX_UNSETTLED_CHARS = 8192
# In a piece of text this short no content is followed by a call.
MAX_PIECE_CHARS = 16


class MessageReader:
    """Reads the message of one sequence. `num_settled` letters of its text are known to belong to
    what the client gets, or to nothing; those after a stop string never are."""

    __slots__ = ("_content", "_num_early", "_parser", "_reasoning", "_unsettled", "num_settled")

    def __init__(self, parser: MessageParser, request: GenerateRequest) -> None:
        strings, keeps_stop = request.stop_strings, request.keeps_stop
        self._parser = parser
        self._content = StopStrings(strings, keeps_stop=keeps_stop) if strings else None
        self._reasoning: StopStrings | None = None
        if strings and request.stops_reasoning:
            self._reasoning = StopStrings(strings, keeps_stop=keeps_stop)
        self._unsettled = ""
        self._num_early = 0  # letters of it that came too early to end anything
        self.num_settled = 0

    @property
    def is_reasoning(self) -> bool:
        return self._parser.is_reasoning

    @property
    def num_calls(self) -> int:
        """Calls that are complete."""
        return self._parser.num_calls

    @property
    def tells_reasoning(self) -> bool:
        return self._parser.knows_reasoning

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        for stops in (self._content, self._reasoning):
            if stops is not None and stops.found is not None:
                return stops.found
        return None

    def push(self, text: str, *, may_stop: bool = True) -> MessageDelta:
        """Returns what new text says. Where it may be stopped a long one is read letter by letter,
        so that no call behind a stop string counts."""
        if self._content is None:
            self.num_settled += len(text)
            return self._parser.push(text)
        found = MessageDelta()
        for piece in text if len(text) > MAX_PIECE_CHARS else (text,):
            self._unsettled += piece
            said = self._parser.push(piece)
            if said:
                found.add(self._until_stop(said, self._content, may_stop=may_stop))
                if self.stop_string is not None:
                    break
            elif self._parser.is_reasoning and self._reasoning is None:
                self._settle(len(self._unsettled))
            elif len(self._unsettled) > MAX_UNSETTLED_CHARS:
                self._settle(MAX_UNSETTLED_CHARS // 2)
        if not may_stop:
            self._num_early = len(self._unsettled)
        return found

    def flush(self, *, is_cut: bool, may_stop: bool = True) -> MessageDelta:
        """Returns what is left when the text has ended, see `MessageParser.flush`."""
        said = self._parser.flush(is_cut=is_cut)
        if self._content is None:
            return said
        said = self._until_stop(said, self._content, may_stop=may_stop)
        if self._reasoning is not None:
            said.reasoning += self._reasoning.flush()
        said.content += self._content.flush()
        return said

    def _until_stop(
        self, said: MessageDelta, content: StopStrings, *, may_stop: bool
    ) -> MessageDelta:
        """Returns what was said, without what is held back or comes after a stop string."""
        if said.reasoning and self._reasoning is not None:
            said.reasoning = self._search(self._reasoning, said.reasoning, may_stop=may_stop)
            if self._reasoning.is_stopped:
                return MessageDelta(reasoning=said.reasoning)
        elif said.reasoning or said.calls:
            self._settle(len(self._unsettled))
        if self._reasoning is not None and (said.content or said.calls):
            said.reasoning += self._reasoning.flush()
        if said.content:
            is_mark = bool(said.warnings)  # what began as a call is text
            said.content = self._search(content, said.content, may_stop=may_stop, is_mark=is_mark)
        return said

    def _search(
        self, stops: StopStrings, text: str, *, may_stop: bool, is_mark: bool = False
    ) -> str:
        place = self._place_of(text, stops.num_held, is_mark=is_mark)
        num_early = len(text)
        if may_stop:
            num_early = min(max(self._num_early - max(place, 0), 0), len(text))
        sure = text[:num_early] + stops.push(text[num_early:])
        self._settle(max(place + len(text) - stops.num_held, 0))
        return sure

    def _place_of(self, text: str, num_held: int, *, is_mark: bool) -> int:
        """Returns where in the unsettled text a text is: after what the stop strings hold, unless a
        mark or a border's white space, which the parser dropped, stands between. Below zero where
        it began before what is unsettled."""
        if self._unsettled.startswith(text, num_held):
            return num_held
        place = self._unsettled.find(text) if is_mark else self._unsettled.rfind(text)
        return place if place >= 0 else len(self._unsettled) - len(text)

    def _settle(self, num: int) -> None:
        self.num_settled += min(num, len(self._unsettled))
        self._unsettled = self._unsettled[num:]
        self._num_early = max(self._num_early - num, 0)
