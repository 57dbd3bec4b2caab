"""Models of what the shared-memory structures promise, searched exhaustively.

``python -m tests.model`` searches them; ``--help`` says how.
"""
