"""The committed reference is what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "reference"


def test_the_page_of_settings_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    committed = (FOLDER / "flags.md").read_text(encoding="utf-8")
    assert committed == generate.flags_page(), "run `python docs/reference/generate.py`"
