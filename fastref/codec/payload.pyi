"""Types of the compiled ``fastref.codec.payload``; what these classes do, only compiled modules can ask for."""

__all__ = ["Decoder", "Encoder"]

class Decoder: ...

class Encoder:
    def __init__(self) -> None: ...
