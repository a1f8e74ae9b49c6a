"""timm's own scripts with this package registered: `timm-eca train ...` or `python -m timm_eca.scripts train ...`."""

from .launch import COMMANDS, run_script

__all__ = ["COMMANDS", "run_script"]
