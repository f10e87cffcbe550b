"""`python -m grail` is `grail`."""

import sys

from grail.cli import main

sys.exit(main())
