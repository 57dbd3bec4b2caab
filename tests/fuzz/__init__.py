"""Random input for everything that reads what a peer wrote; ``python -m tests.fuzz`` runs it, see ``decoders.py``."""
