"""The data of this family is that of `electricity`: only what is made of it differs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

write_data = runpy.run_path(str(Path(__file__).parents[1] / "electricity/data.py"))["write_data"]

if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
