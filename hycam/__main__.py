"""`python -m hycam`."""

import sys

from hycam_cli import main

if __name__ == "__main__":
    sys.exit(main())
