from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_lm_server.errors import ConfigError, InvalidRequestError, ModelError
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.template_files import find_templates, without_default

LIST = [
    {"name": "tool_use", "template": "T"},
    {"name": "default", "template": "D"},
    {"name": "rag", "template": "R"},
    {"name": 7, "template": "x"},
    {"name": "broken"},
    "x",
]
NAMED = {"tool_use": "T", "default": "D", "rag": "R"}


def put(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, {}),
        ("C", {"default": "C"}),
        (LIST, NAMED),
        (NAMED, NAMED),
        (5, {}),
        ([], {}),
    ],
)
def test_the_config_has_one_or_a_list_or_an_object(
    tmp_path: Path, given: Any, found: dict[str, str]
) -> None:
    assert find_templates(tmp_path, {"chat_template": given}, None) == found


def test_a_file_makes_the_configs_void(tmp_path: Path) -> None:
    put(tmp_path, "chat_template.jinja", "F")
    assert find_templates(tmp_path, {"chat_template": LIST}, None) == {"default": "F"}


def test_additional_files_have_names_and_leave_the_configs_default(tmp_path: Path) -> None:
    put(tmp_path, "additional_chat_templates/tool_use.jinja", "A")
    put(tmp_path, "additional_chat_templates/notes.txt", "N")
    found = find_templates(tmp_path, {"chat_template": "C"}, None)
    assert found == {"default": "C", "tool_use": "A"}
    put(tmp_path, "chat_template.jinja", "F")
    found = find_templates(tmp_path, {"chat_template": LIST}, None)
    assert found == {"default": "F", "tool_use": "A"}


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_processors_template_is_the_last_resort(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, json.dumps({"chat_template": "P"}))
    assert find_templates(tmp_path, {}, None) == {"default": "P"}
    assert find_templates(tmp_path, {"chat_template": "C"}, None) == {"default": "C"}


def test_the_users_template_is_the_only_one(tmp_path: Path) -> None:
    put(tmp_path, "mine.jinja", "M")
    config = {"chat_template": LIST}
    assert find_templates(tmp_path, config, "{{ x }}") == {"default": "{{ x }}"}
    assert find_templates(tmp_path, config, str(tmp_path / "mine.jinja")) == {"default": "M"}
    assert find_templates(tmp_path, config, "rag") == {"default": "R"}
    with pytest.raises(ConfigError):
        find_templates(tmp_path, config, str(tmp_path / "nothing"))


def test_a_file_that_is_no_text_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        find_templates(tmp_path, {}, None)


def test_a_model_without_a_default_says_how_to_choose_one() -> None:
    template = ChatTemplate(without_default(["tool_use", 'a"b']), {})
    with pytest.raises(InvalidRequestError, match=r'a"b, tool_use.*--chat-template'):
        template.render([{"role": "user", "content": "x"}], {})
