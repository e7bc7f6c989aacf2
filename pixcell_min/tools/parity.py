"""Runs the parity certificate: each component beside diffusers, peft, timm and accelerate.

    python -m pixcell_min.tools.parity
    python -m pixcell_min.tools.parity --write

The comparison is `tests/certificate.py` of a checkout, for no module of the package imports a
reference, this one neither. It says what is missing, then hands the flags on.
"""

import runpy
import sys
from importlib.util import find_spec

from pixcell_min.base import REPOSITORY

CERTIFICATE = REPOSITORY / "tests" / "certificate.py"
NEEDED = ("diffusers", "peft", "accelerate", "timm", "torchvision", "pytest")


def main(argv=None) -> int:
    """Run the command line; → exit code: 0, 1 if a row fails, 2 after a one-line error."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not CERTIFICATE.is_file():
        line = f"{CERTIFICATE}: not here; the certificate needs a checkout of the repository"
    elif missing:
        line = f"{', '.join(missing)} not installed; run pip install -e '.[test]' in {REPOSITORY}"
    else:
        sys.path.insert(0, str(CERTIFICATE.parent))  # its helpers lie beside it
        return runpy.run_path(str(CERTIFICATE))["main"](argv)
    print(f"parity: error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
