"""`python -m rayft.cli`."""

import sys

from rayft.cli import main

if __name__ == "__main__":
    sys.exit(main())
