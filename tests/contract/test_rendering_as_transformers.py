"""What goes into a prompt is what transformers' apply_chat_template makes of the same messages,
with arguments as objects, as its documentation has them."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from mlx_lm_server.server.protocols.openai.chat_prompt import chat_prompt
from mlx_lm_server.server.protocols.openai.schema import parse_chat
from tests.family_templates import FAMILIES
from tests.property.test_round_trips import TOOLS, model_of

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Do it."}
CALL = {"name": "write_file", "arguments": '{"path": "a.txt", "text": "x\\ny\\n"}'}
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}],
}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "write_file", "content": "ok"}
SAID = {"role": "assistant", "content": "Done."}
CONVERSATIONS = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, SAID, USER],
    "call": [USER, CALLING],
    "result": [USER, CALLING, RESULT],
    "after results": [USER, CALLING, RESULT, SAID, USER],
}
# Ids of theirs name the function, which the id of this conversation does not.
OTHERS_IDS = {"Kimi K2"}


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    copied = copy.deepcopy(messages)
    for message in copied:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return copied


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("has_tools", [True, False])
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - OTHERS_IDS))
def test_the_prompt_is_that_of_transformers(
    theirs: Any, name: str, has_tools: bool, conversation: str
) -> None:
    messages = CONVERSATIONS[conversation]
    tools = TOOLS if has_tools else None
    expected = theirs.apply_chat_template(
        with_objects(messages),
        tools=tools,
        chat_template=FAMILIES[name].template,
        add_generation_prompt=True,
        tokenize=False,
    )
    request = parse_chat({"messages": messages} | ({"tools": tools} if tools else {}))
    model = model_of(name)
    prompt = chat_prompt(model, request.messages, None, tools=request.tools)
    assert asyncio.run(prompt.render(model)) == expected
