"""Search the models from a shell: ``python -m tests.model --help``."""

from __future__ import annotations

import sys

from tests.model.command import main

sys.exit(main())
