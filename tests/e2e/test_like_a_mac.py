"""A server with everything taken away that only Linux has, and a device that looks like Metal's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlx_lm_server import nano as nano_files
from mlx_lm_server import platform
from tests.e2e.conftest import Nano

pytestmark = pytest.mark.skipif(not platform.is_linux(), reason="takes away what only Linux has")

HERE = Path(__file__).parent / "like_a_mac"
CONTEXT_TOKENS = 40960
LONG_PROMPT_TOKENS = 32768
QUESTION = [{"role": "user", "content": "Count from 1 to 5."}]
SEEN_INSIDE = """
import os, psutil, socket, sys, resource
from pathlib import Path
from mlx_lm_server import native, platform
assert (sys.platform, platform.machine()) == ("darwin", "arm64")
assert not platform.cpu_flags() and not platform.is_linux() and not platform.is_x86()
assert platform.usable_cores() == os.cpu_count() and not hasattr(os, "sched_getaffinity")
assert psutil.virtual_memory().total > 0
assert native.load("files") is None
for open_ in (open, os.open, Path.read_text):
    try:
        open_(Path("/proc/cpuinfo"), *([0] if open_ is os.open else []))
    except FileNotFoundError:
        continue
    raise AssertionError(open_)
end, _ = socket.socketpair()
assert end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 8192
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, resource.RLIM_INFINITY)
import mlx.core as mx
assert mx.default_device() == mx.Device(mx.cpu) and "memory_size" not in mx.device_info()
from mlx_lm_server.runner.backends.choose import choose
assert (choose().policy.way, choose().policy.device) == ("metal", "Apple M2")
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With nothing in it that another test or a user has set."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "MAC_PROGRAMS": str(tmp_path / "programs"),
    }


@pytest.fixture
def wide_nano(tmp_path: Path) -> Path:
    """Nano, told to take long prompts."""
    [root] = nano_files.__path__
    folder = shutil.copytree(root, tmp_path / "nano")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT_TOKENS
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_interpreter_is_made_to_look_like_a_mac(environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", SEEN_INSIDE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_server_without_anything_of_linux_serves_and_stops(
    nano: Nano, wide_nano: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    mac = Nano(
        tmp_path / "server.log",
        *("--prefill-step-size", "64"),  # so that something is seen of a long prompt soon
        cache_dir=tmp_path / "tier",
        model=str(wide_nano),
        env=environment,
    )
    try:
        _look_at(mac)
        assert _answer(mac) == _answer(nano)
        _begin_a_long_prompt(mac)
        assert _answer(mac) == _answer(nano)
        metrics = mac.client.get("/metrics").text
        assert "mlx_lm_server:request_success_total{" in metrics
        engine = mac.engine()
        begun_s = time.monotonic()
        assert mac.stop() == 0
        assert time.monotonic() - begun_s < 20
        assert not engine.is_running()
    finally:
        mac.stop()
    output = mac.output()
    assert "Traceback" not in output
    assert "ERROR" not in output
    programs = (tmp_path / "programs").read_text().split()
    assert {Path(program).name for program in programs} == {Path(sys.executable).name}


def _look_at(mac: Nano) -> None:
    engine = mac.client.get("/health").json()["engine"]
    assert (engine["device"], engine["way"], engine["blas"]) == ("Apple M2", "metal", "")
    [line] = [line for line in mac.output().splitlines() if "device " in line]
    assert line.strip("│ ").split() == ["device", "Apple", "M2"]
    soft, hard = psutil.Process(mac.process.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == min(10240, hard)


def _answer(server: Nano) -> str:
    body = {"messages": QUESTION, "temperature": 0}
    content: str = server.client.post("/v1/chat/completions", json=body).json()["choices"][0][
        "message"
    ]["content"]
    return content


def _begin_a_long_prompt(mac: Nano) -> None:
    """Returns when its first tokens are computed, and it has been left."""
    body = {
        "messages": [{"role": "user", "content": "the cat sat " * (LONG_PROMPT_TOKENS // 4)}],
        "stream": True,
        "return_progress": True,
    }
    with mac.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        first: dict[str, Any] = json.loads(next(response.iter_lines()).removeprefix("data: "))
    progress = first["prompt_progress"]
    assert progress["total"] > LONG_PROMPT_TOKENS
    assert 0 < progress["processed"] < 1000
    deadline_s = time.monotonic() + 20
    while mac.client.get("/health").json()["num_running"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
