"""Python objects to payload bytes and back."""
