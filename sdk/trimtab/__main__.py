"""`python -m trimtab` is the command `trimtab`."""

import sys

from trimtab.cli import main

sys.exit(main())
