"""`python -m twostep` is the command line."""

import sys

from twostep.cli import main

sys.exit(main())
