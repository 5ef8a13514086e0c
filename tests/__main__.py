"""The one command for all checks: `python -m tests` (format, lint, types, tests); `--fast` leaves slow tests out.

Everything after `--` goes to pytest.  The exit code is that of the first check that failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = (
    ("ruff", "format", "--check", "."),
    ("ruff", "check", "."),
    ("pyright", "--pythonpath", sys.executable),
    # Two processes: tests are small, and a laptop has at least two cores.
    ("pytest", "-n", "2", "--dist", "loadfile"),
)


def main(arguments: list[str]) -> int:
    """Run the checks in order and stop at the first that fails."""
    fast = "--fast" in arguments
    extra = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    # One thread a process: torch's own threads would fight over the cores, and small tensors gain nothing by them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    for check in CHECKS:
        command = list(check)
        if check[0] == "pytest":
            command += (["-m", "not slow"] if fast else []) + extra
        print(f"$ {' '.join(command)}", flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, check=False).returncode
        print(f"  {'passed' if code == 0 else f'failed ({code})'} in {time.monotonic() - start:.0f} s\n", flush=True)
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
