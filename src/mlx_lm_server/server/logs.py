"""Logging of the server process: one line per event, for people or as JSON, to stderr."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

TRACE = 5
logging.addLevelName(TRACE, "TRACE")
LEVELS = {
    "critical": logging.CRITICAL,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
}


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(level: str, format: str) -> None:
    """Lets our modules log from `level` on; libraries speak up from warning on unless we debug."""
    handler = logging.StreamHandler(sys.stderr)
    if format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(
        max(LEVELS[level], logging.DEBUG if LEVELS[level] < logging.INFO else logging.WARNING)
    )
    logging.getLogger("mlx_lm_server").setLevel(LEVELS[level])
    for name in ("uvicorn.access", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)
