"""fastref: remote references for Python and PyTorch."""
