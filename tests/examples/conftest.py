import sys
from pathlib import Path

# A script's directory is on sys.path when it runs, so the examples import each other by bare names.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
