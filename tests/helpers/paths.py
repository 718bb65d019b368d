"""Where things are in the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "rotary_export" / "csrc"
KITS = ROOT / "rotary_export" / "deploy" / "kits"
EXPORTED = ROOT / "exported"
TOOLS = ROOT / "tools"
