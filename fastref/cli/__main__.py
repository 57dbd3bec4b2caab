"""``python -m fastref.cli``: the command without its script."""

import sys

from fastref.cli import main

if __name__ == "__main__":
    sys.exit(main())
