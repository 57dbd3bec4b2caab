"""The rules: events in, commands out. No thread, clock, socket or pickle in this room.

Each class here is a state machine with one method ``handle(event)`` that returns the commands to perform, in order. An
event that cannot happen raises ``ProtocolError`` and changes nothing. One caller at a time.
"""
