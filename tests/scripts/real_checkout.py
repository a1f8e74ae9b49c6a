"""The tests that need timm's own scripts: where those are, and the mark that skips the tests without them."""

import os
from pathlib import Path

import pytest

REAL = Path(os.environ.get("TIMM_SCRIPTS") or "no-checkout").absolute()

needs_timms_scripts = pytest.mark.skipif(
    not (REAL / "train.py").is_file(), reason="timm's scripts are not here: name a checkout with TIMM_SCRIPTS"
)
