"""The server as a program, with a fake engine or another one: `python serve_fake.py JSON`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fakes
from mlx_lm_server.config_loading import load_config
from mlx_lm_server.errors import ConfigError
from mlx_lm_server.server.engines.supervisor import Limits
from mlx_lm_server.server.http.connection import ConnectionLimits
from mlx_lm_server.server.serve import Surroundings, run


def main() -> int:
    spec = json.loads(sys.argv[1])
    try:
        config = load_config(spec["flags"], os.environ, None)
    except ConfigError as error:
        print(error)
        return 2
    surroundings = Surroundings(
        engine_command=spec["engine_command"] or fakes.command(**spec["engine"]),
        limits=Limits(**spec["limits"]),
        connection_limits=ConnectionLimits(**spec["connection"]),
    )
    return run(config, surroundings)


if __name__ == "__main__":
    sys.exit(main())
