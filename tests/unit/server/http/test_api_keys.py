from __future__ import annotations

from pathlib import Path

import pytest

from mlx_lm_server.errors import ConfigError
from mlx_lm_server.server.http.api_keys import ApiKeys


def test_keys_come_from_the_flag_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# comment\n\nk1 alice smith\nk2\n")
    keys = ApiKeys("k0", str(file))
    assert keys.name_of(b"k0") == "default"
    assert keys.name_of(b"k1") == "alice smith"
    assert (keys.name_of(b"k2") or "").startswith("key-")
    assert keys.name_of(b"#") is None
    assert keys.name_of(b"") is None


def test_a_key_that_left_the_file_is_valid_no_more_after_a_reload(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys = ApiKeys(None, str(file))
    file.write_text("new\n")
    keys.reload()
    assert keys.name_of(b"old") is None
    assert keys.name_of(b"new")


def test_without_keys_none_is_required(tmp_path: Path) -> None:
    assert not ApiKeys(None, None).is_required
    with pytest.raises(ConfigError):
        ApiKeys(None, str(tmp_path / "nothing"))
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigError):
        ApiKeys(None, str(tmp_path / "empty"))
