"""`python -m remixdit`, and `torchrun -m remixdit`."""

import sys

from remixdit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
