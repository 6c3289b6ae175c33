"""`python -m fedtt` is the `fedtt` command."""

import sys

from fedtt.cli import main

sys.exit(main())
