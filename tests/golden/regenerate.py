"""Computes the golden numbers anew (`make golden`), prints what changed, and says what the changelog needs."""

import sys
import tempfile
from pathlib import Path

from tests.golden.goldens import ALL, compute, differences, digest


def main() -> None:
    for golden in ALL:
        with tempfile.TemporaryDirectory() as folder:
            computed = compute(golden, Path(folder))
        if golden.path.exists():
            found = differences(golden, golden.read(), computed)
            sys.stdout.write(f"{golden.path.name}: {len(found)} values outside the tolerance\n")
            if len(found):
                sys.stdout.write(f"{found.to_string(max_rows=40)}\n")
        golden.write(computed)
    sys.stdout.write(f'CHANGELOG.md has to name these numbers: "Numbers change: ... (golden {digest()})"\n')


if __name__ == "__main__":
    main()
