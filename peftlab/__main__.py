"""`python -m peftlab` is `peftlab`."""

import sys

from peftlab.cli import main

sys.exit(main())
