import sys
from pathlib import Path

# The simulators live beside the unit tests of what they simulate.
for part in ("core", "tier"):
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / part))
