"""`python -m serving` is the `sloraj` command."""

import sys

from serving.cli import main

sys.exit(main())
