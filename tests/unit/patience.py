"""How long a test waits for another process. The limit ends one that hangs; it must never fail one that is slow."""

HUNG_SECONDS = 1800
