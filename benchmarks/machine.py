"""What a result was measured on, without what would name the machine or its owner."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import psutil

from mlx_lm_server.platform import cpu_name, usable_cores

PACKAGES = ("mlx", "mlx-lm", "mlx-lm-server", "scipy-openblas32", "uvicorn", "uvloop")


def facts() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
