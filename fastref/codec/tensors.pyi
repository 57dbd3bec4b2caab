"""Types of the compiled ``fastref.codec.tensors``, which has no names for Python."""
