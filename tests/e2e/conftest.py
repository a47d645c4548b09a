from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import psutil
import pytest


class Nano:
    """`mlx-lm-server --model nano`, as a user starts it; its cache is on disk only where a test
    says in which folder."""

    def __init__(
        self,
        log: Path,
        *flags: str,
        cache_dir: Path | None = None,
        model: str = "nano",
        env: Mapping[str, str] | None = None,
    ) -> None:
        disk = ("--no-ssd",) if cache_dir is None else ("--ssd-cache-dir", str(cache_dir))
        command = [sys.executable, "-m", "mlx_lm_server", "--model", model]
        self._log = log
        self.began_s = time.monotonic()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--port", "0", *disk, *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
            )
        self.url = self._wait_for_url()
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _wait_for_url(self) -> str:
        """From the banner, which comes when the server is ready."""
        while "openai.OpenAI" not in (output := self._log.read_text()):
            assert self.process.poll() is None, output
            assert time.monotonic() - self.began_s < 60, output
            time.sleep(0.02)
        return next(word for word in output.split() if word.startswith("http://"))

    def engine(self) -> psutil.Process:
        return psutil.Process(self.client.get("/health").json()["engine"]["pid"])

    def is_idle(self) -> bool:
        facts = self.client.get("/health").json()
        return bool(facts["num_running"] == facts["num_waiting"] == facts["kv_used_bytes"] == 0)

    def output(self) -> str:
        return self._log.read_text()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        self.client.close()
        return self.process.wait(40)


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nano]:
    running = Nano(tmp_path_factory.mktemp("nano") / "server.log")
    yield running
    running.stop()
