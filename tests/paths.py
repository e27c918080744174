"""Where things lie."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bertlite"
SAMPLE = PACKAGE / "sample"
SHARED = ROOT.parent / "shared" / "data"  # development data, which a clone alone does not have
