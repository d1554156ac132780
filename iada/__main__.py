"""`python -m iada`."""

import sys

from iada.cli import main

if __name__ == "__main__":
    sys.exit(main())
