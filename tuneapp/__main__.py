"""`python -m tuneapp`."""

import sys

from tuneapp.cli import main

sys.exit(main())
