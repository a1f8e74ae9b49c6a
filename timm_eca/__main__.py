"""`python -m timm_eca ...`: what `timm-eca ...` does."""

import sys

from .cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
