"""Gives every reader so many bad inputs: ``python -m tests.faults.bad_input --inputs 700``."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

TESTS = 22
"""How many tests make inputs; the others of that file damage each byte, or each part, once."""


def main() -> int:
    """Runs ``tests/test_bad_input.py`` at length."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--inputs", type=int, default=700, help=f"For each of the {TESTS} tests.")
    options = parser.parse_args()
    test = Path(__file__).resolve().parents[1] / "test_bad_input.py"
    environment = {**os.environ, "SLM_PL_INPUTS": str(options.inputs)}
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", str(test)], env=environment, check=False).returncode
    lost = "none" if code == 0 else "some"
    print(f"{TESTS} tests x {options.inputs:,} = {TESTS * options.inputs:,} inputs, {lost} lost")
    return code


if __name__ == "__main__":
    sys.exit(main())
