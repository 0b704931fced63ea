"""`python -m peftlab` is `peftlab`."""

import sys

from peftlab.commands.cli import main

sys.exit(main())
