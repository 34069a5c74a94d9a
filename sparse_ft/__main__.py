"""`python -m sparse_ft` is `sparse-ft`."""

import sys

from sparse_ft.cli import main

sys.exit(main())
