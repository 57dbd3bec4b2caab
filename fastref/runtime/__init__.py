"""One worker: its threads, its peers, and the wiring between channels, codec and protocol."""
