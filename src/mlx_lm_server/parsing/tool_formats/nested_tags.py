"""MiniMax M3's calls: each argument is a tag of its own name, and values nest as tags.

]<]minimax[>[<tool_call>
]<]minimax[>[<invoke name="f">]<]minimax[>[<city>Bonn]<]minimax[>[</city>]<]minimax[>[</invoke>
]<]minimax[>[</tool_call>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import EndOfTextError, Markers, Reader, Script, UnparsableError
from mlx_lm_server.parsing.tool_formats.arguments import ArgumentWriter, value_of
from mlx_lm_server.parsing.tool_formats.format import ToolFormat, ToolSchemas, dump
from mlx_lm_server.parsing.tool_formats.named_calls import name_until
from mlx_lm_server.parsing.tool_schemas import kinds_of

ITEM = "item"
MAX_DEPTH = 32


@dataclass(frozen=True)
class NestedTags:
    """`space` stands before each tag, so that no text looks like one."""

    space: str

    def format(self, name: str) -> ToolFormat:
        start = f"{self.space}<tool_call>"
        return ToolFormat(name, self.read, starts=(start,), marks=(self.space,), write=self.write)

    def read(
        self, reader: Reader, out: MessageBuilder, schemas: ToolSchemas, _start: str
    ) -> Script[None]:
        yield from reader.skip_space()
        yield from reader.expect(f"{self.space}<invoke name=")
        while True:
            name = yield from name_until(reader, ">")
            writer = ArgumentWriter(name, out, schemas)
            yield from self._arguments(reader, writer, schemas)
            writer.end()
            yield from reader.skip_space()
            if not (yield from reader.accept(f"{self.space}<invoke name=")):
                break
        yield from reader.accept(f"{self.space}</tool_call>")

    def _arguments(
        self, reader: Reader, writer: ArgumentWriter, schemas: ToolSchemas
    ) -> Script[None]:
        while True:
            yield from reader.skip_space()
            yield from reader.expect(f"{self.space}<")
            tag = yield from name_until(reader, ">")
            if tag == "/invoke":
                return
            writer.begin(tag)
            if writer.kinds(tag) == {"string"}:
                yield from self._text(reader, writer, tag)
                continue
            raw = yield from reader.until(f"{self.space}</{tag}>")
            root = schemas.root_of(writer.function)
            writer.json(self._value(raw, schemas.schema_of(writer.function, tag), root, tag, 0))

    def _text(self, reader: Reader, writer: ArgumentWriter, tag: str) -> Script[None]:
        writer.begin_text()
        end = Markers((f"{self.space}</{tag}>",))
        if (yield from reader.pass_until(end, writer.text)) is None:
            raise EndOfTextError(f"</{tag}> is missing")
        writer.end_text()

    def _value(self, raw: str, schema: Any, root: Mapping[str, Any], key: str, depth: int) -> Any:
        """Returns the value of what stands between two tags. Raises UnparsableError."""
        kinds = kinds_of(schema, root)
        is_text = bool(kinds) and kinds.isdisjoint(("array", "object"))
        if is_text or self.space not in raw or depth == MAX_DEPTH:
            empty: Any = [] if "array" in kinds else {} if "object" in kinds else None
            return value_of(raw, kinds, key) if raw.strip() or empty is None else empty
        members = self._members(raw)
        if all(name == ITEM for name, _ in members) and ("array" in kinds or not kinds):
            items = schema.get("items") if isinstance(schema, dict) else None
            return [self._value(text, items, root, key, depth + 1) for _, text in members]
        properties = schema.get("properties") if isinstance(schema, dict) else None
        known = properties if isinstance(properties, dict) else {}
        return {
            name: self._value(text, known.get(name), root, name, depth + 1)
            for name, text in members
        }

    def _members(self, raw: str) -> list[tuple[str, str]]:
        """Returns names and contents of the tags that stand beside each other in a text."""
        found: list[tuple[str, str]] = []
        place, open_ = 0, self.space + "<"
        while (begin := raw.find(open_, place)) >= 0:
            name_end = raw.find(">", begin + len(open_))
            name = raw[begin + len(open_) : name_end]
            end = self._end_of(raw, name, name_end + 1)
            found.append((name, raw[name_end + 1 : end]))
            place = end + len(f"{self.space}</{name}>")
        return found

    def _end_of(self, raw: str, name: str, place: int) -> int:
        begin_tag, end_tag, depth = f"{self.space}<{name}>", f"{self.space}</{name}>", 1
        while depth:
            end, begin = raw.find(end_tag, place), raw.find(begin_tag, place)
            if end < 0:
                raise UnparsableError(f"</{name}> is missing")
            is_nested = 0 <= begin < end
            depth += 1 if is_nested else -1
            place = (begin if is_nested else end) + 1
        return place - 1

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        lines = [f"{self.space}<tool_call>"]
        for name, arguments in calls:
            inner = "".join(self._written(key, value) for key, value in arguments.items())
            lines.append(f'{self.space}<invoke name="{name}">{inner}{self.space}</invoke>')
        return "\n".join([*lines, f"{self.space}</tool_call>"])

    def _written(self, key: str, value: Any) -> str:
        if isinstance(value, dict):
            text = "".join(self._written(k, v) for k, v in value.items())
        elif isinstance(value, list):
            text = "".join(self._written(ITEM, item) for item in value)
        else:
            text = value if isinstance(value, str) else dump(value)
        return f"{self.space}<{key}>{text}{self.space}</{key}>"


MINIMAX_M3 = NestedTags("]<]minimax[>[")
