"""`python -m deltamux` is `deltamux`."""

import sys

from deltamux.cli import main

sys.exit(main())
