"""`python -m tuneapp`."""

import sys

from tuneapp.cli import main

if __name__ == "__main__":  # the processes that decode images import this module, too
    sys.exit(main())
