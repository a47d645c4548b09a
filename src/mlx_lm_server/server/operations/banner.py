"""What a start shows: progress while the model loads, then what is served and how to use it."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from mlx_lm_server import __version__
from mlx_lm_server.config import Config, TierConfig
from mlx_lm_server.protocol import LoadProgress, Ready
from mlx_lm_server.server.models.served_model import ServedModel

log = logging.getLogger(__name__)


class StartDisplay:
    """A bar in a terminal; log lines everywhere else, one per stage."""

    def __init__(self, *, is_json: bool) -> None:
        self._console = Console(soft_wrap=False)
        self._is_json = is_json
        self._stage = ""
        self._is_closed = False
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def show(self, progress: LoadProgress) -> None:
        if self._is_closed or self._is_json or not self._console.is_terminal:
            if progress.stage != self._stage:
                log.info("loading: %s", progress.stage)
        else:
            self._show_bar(progress)
        self._stage = progress.stage

    def _show_bar(self, progress: LoadProgress) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=1.0)
        if self._task is not None:
            self._progress.update(
                self._task, completed=progress.fraction, description=escape(progress.stage)
            )

    def close(self) -> None:
        self._is_closed = True
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def banner(self, config: Config, model: ServedModel, ready: Ready, url: str) -> None:
        self.close()
        if self._is_json:
            log.info("serving %s at %s on %s", model.names.shown[0], url, ready.device)
            return
        title = f"mlx-lm-server {__version__}"
        self._console.print(Panel(_facts(config, model, ready, url), title=title, expand=False))
        self._console.print(_examples(config, model.names.shown[0], url), soft_wrap=True)


def _facts(config: Config, model: ServedModel, ready: Ready, url: str) -> Table:
    table = Table.grid(padding=(0, 2))
    kv_tokens = f"{model.bounds.kv_tokens:,} tokens, {_size(ready.kv_limit_bytes)}"
    if ready.kv_format:
        kv_tokens += f", {ready.kv_format}"
    rows = {
        "model": ", ".join(model.names.shown),
        "device": f"{ready.device}, BLAS {ready.blas}" if ready.blas else ready.device,
        "weights": f"{ready.weights}, {_size(ready.weights_bytes)}, loaded in {ready.load_s:.1f} s",
        "context": f"{model.bounds.context_tokens:,} tokens",
        "KV memory": kv_tokens,
        "batch": f"{config.batching.max_batch_size} rows, {config.batching.max_queue_size} queued",
        "disk cache": _disk_cache(config.tier, ready),
        "URL": url,
        "docs": _docs(config, url),
        "stop": "Ctrl-C",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    return table


def _disk_cache(config: TierConfig, ready: Ready) -> str:
    """Names the folder of all models; that of this one is in /health."""
    if not ready.disk_tier:
        return "off"
    limit_gb = config.ssd_max_size_gb
    most = f"up to {limit_gb:g} GB" if limit_gb else "no limit"
    return f"{config.ssd_policy}, {most} (--ssd-max-size-gb), {Path(ready.disk_tier).parent}"


def _docs(config: Config, url: str) -> str:
    """Returns where the documentation is; a browser cannot open a Unix socket."""
    return f"{url}/docs" if config.server.uds is None else "/docs on the socket"


def _examples(config: Config, name: str, url: str) -> str:
    has_key = config.server.api_key is not None or config.server.api_key_file is not None
    auth = " -H 'Authorization: Bearer '$KEY" if has_key else ""
    key = "KEY" if has_key else "none"
    target = url
    if config.server.uds is not None:
        target, auth = "http://localhost", f" --unix-socket {config.server.uds}{auth}"
    curl = (
        f"curl{auth} {target}/v1/chat/completions -H 'Content-Type: application/json' "
        """-d '{"messages":[{"role":"user","content":"Hello"}]}'"""
    )
    python = (
        f'client = openai.OpenAI(base_url="{target}/v1", api_key="{key}")\n'
        f'client.chat.completions.create(model="{name}", '
        'messages=[{"role": "user", "content": "Hello"}])'
    )
    return escape(f"\n{curl}\n\n{python}\n")


def _size(num_bytes: int) -> str:
    if num_bytes >= 10**9:
        return f"{num_bytes / 10**9:.2f} GB"
    return f"{num_bytes / 10**6:.0f} MB"
