"""Ordered, reliable frames to one peer, and the inbox where frames from all peers arrive."""
