"""Where caches go, whoever runs the server."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from mlx_lm_server import folders, native
from mlx_lm_server.errors import ConfigError
from mlx_lm_server.folders import cache_folder, expanded

UNKNOWN_UID = 4_000_123


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whom no system knows; gives the temporary folder."""
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_users_cache_folder_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "mlx-lm-server"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "mlx-lm-server"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / "home" / ".cache" / "mlx-lm-server"
    assert list(tmp_path.iterdir()) == [], "asking makes nothing"


def test_without_home_the_entry_of_the_user_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    assert cache_folder() == home / ".cache" / "mlx-lm-server"


def test_an_unknown_user_has_a_temporary_folder_of_its_own(nobody: Path) -> None:
    found = cache_folder()
    assert found == nobody / f"mlx-lm-server-{os.getuid()}"
    assert found.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == found
    assert native.cache_folder() == found / "native"


def test_a_home_that_is_no_folder_is_passed_over(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nobody / "file").write_text("")
    monkeypatch.setenv("HOME", str(nobody / "file"))
    assert cache_folder() == nobody / f"mlx-lm-server-{os.getuid()}"


def test_a_home_that_cannot_be_written_to_is_passed_over(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(nobody / "home"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache_folder() == nobody / f"mlx-lm-server-{os.getuid()}"


@pytest.mark.parametrize("kind", ["open to others", "of another user", "a link", "a file"])
def test_a_temporary_folder_that_others_could_fill_is_not_used(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Code that lies there would run."""
    folder = nobody / f"mlx-lm-server-{os.getuid()}"
    if kind == "a file":
        folder.write_text("")
    elif kind == "a link":
        (nobody / "other").mkdir(mode=0o700)
        folder.symlink_to(nobody / "other")
    else:
        folder.mkdir(mode=0o700)
    if kind == "open to others":
        folder.chmod(0o770)
    if kind == "of another user":
        os.chown(folder, UNKNOWN_UID, -1) if os.getuid() == 0 else pytest.skip("wants root")
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        cache_folder()
    assert native.cache_folder() is None
    assert native.load("products") is None


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/keys") == Path("/home/me/keys")
    assert expanded("keys~") == Path("keys~")


def test_a_tilde_without_a_home_is_refused(nobody: Path) -> None:
    with pytest.raises(ConfigError, match="~/keys: no home folder is known"):
        expanded("~/keys")
    assert expanded("/etc") == Path("/etc")


def test_downloads_go_to_a_folder_that_can_be_named(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.name_for_hub()
    assert os.environ["HF_HOME"] == str(cache_folder() / "huggingface")
    monkeypatch.setenv("HF_HOME", "/models")
    folders.name_for_hub()
    assert os.environ["HF_HOME"] == "/models"


def test_with_a_home_downloads_go_where_they_always_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folders.name_for_hub()
    assert "HF_HOME" not in os.environ
