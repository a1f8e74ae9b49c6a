"""The sha256 sums of timm's scripts by release tag: what a download must be, to the bit."""

import json
from importlib.resources import files

__all__ = ["SHA256"]

SHA256: dict[str, dict[str, str]] = json.loads((files(__package__) / "pins.json").read_text())
