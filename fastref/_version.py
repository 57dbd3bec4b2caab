"""The version, said once: packaging, documentation and the program read it here."""

__version__ = "0.1.0.dev0"
