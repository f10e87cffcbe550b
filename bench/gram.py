"""Runs `bench.kernels.gram`: python bench/gram.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run without an installation

from bench.kernels.gram import main

if __name__ == "__main__":
    sys.exit(main())
