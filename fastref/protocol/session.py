"""What one end of a session does when the connection under it breaks: come again, wait, or give the other end up.

Of the two ends the asker connects, again too; the listener can only wait, but dials all the same: to find out whether
the other end lives, and to tell it that the connection is missed, of which it may not know.

    state      event                           next       commands
    connected  Broke                           away       Dial, after a pause if the connection did not last; Accept
                                                          if the asker has come already
    connected  Came, newer than all before     connected  HangUp, and Accept when that has broken the connection
    connected  Called, about this connection   connected  Answer, HangUp
    connected  Called, about one before        connected  Answer
    away       Missed, Heard                   away       Dial after a pause, which grows
    away       Came                            away       Accept
    away       Called                          away       Answer, and Dial
    away       Resumed                         connected
    away       Refused                         over       GiveUp: its process has ended
    away       Tick, its time is over          over       GiveUp
    any        Denied                          over       GiveUp: for the other end this one is over
    any        Spoilt, Left, Ended             over       GiveUp
    over       Came, Called                    over       Deny
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastref.errors import ProtocolError

__all__ = [
    "Accept",
    "Answer",
    "Broke",
    "Called",
    "Came",
    "Command",
    "Denied",
    "Deny",
    "Dial",
    "Ended",
    "Event",
    "GiveUp",
    "HangUp",
    "Heard",
    "Left",
    "Missed",
    "Refused",
    "Resumed",
    "Session",
    "Spoilt",
    "Tick",
]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
STEADY_S = 1.0
"""A connection that holds for so long was no failure: the next one is asked for at once."""


@dataclass(frozen=True)
class Broke:
    """The connection has ended, nobody knows why. ``since_s``: when the other end was known to be there."""

    reason: str
    since_s: float


@dataclass(frozen=True)
class Spoilt:
    """What came over the connection was nonsense."""

    reason: str


@dataclass(frozen=True)
class Left:
    """The connection has ended behind a farewell."""

    reason: str


@dataclass(frozen=True)
class Ended:
    """The other end was given up for a reason of another room, which has acted upon it already."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """Nothing listens where the other end did."""


@dataclass(frozen=True)
class Missed:
    """Dialing has come to nothing."""

    reason: str


@dataclass(frozen=True)
class Denied:
    """The other end lives, and does not go on."""

    sentence: str


@dataclass(frozen=True)
class Heard:
    """The other end lives, and knows by now that the connection is missed."""


@dataclass(frozen=True)
class Came:
    """The asker has come to go on."""

    attempt: int


@dataclass(frozen=True)
class Called:
    """The listener misses the connection that was made by this attempt."""

    attempt: int


@dataclass(frozen=True)
class Resumed:
    """The session goes on over a new connection."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Dial:
    """Connect to the other end. One who asks says which attempt this is, the other which connection he misses."""

    attempt: int


@dataclass(frozen=True)
class HangUp:
    """End the present connection; ``Broke`` follows."""


@dataclass(frozen=True)
class Accept:
    """Go on over the connection of the asker who has come."""


@dataclass(frozen=True)
class Answer:
    """Tell who called that he was heard."""


@dataclass(frozen=True)
class Deny:
    """Tell who came or called that this session is over, and why."""

    reason: str


@dataclass(frozen=True)
class GiveUp:
    """The other end counts as dead, or, if it ``left``, as gone."""

    reason: str
    left: bool = False


Event = Broke | Spoilt | Left | Ended | Refused | Missed | Denied | Heard | Came | Called | Resumed | Tick
Command = Dial | HangUp | Accept | Answer | Deny | GiveUp


class Session:
    """One end, from its first connection to its end.

    Parameters
    ----------
    asks : bool
        Whether this end is the asker.
    patience_s : float
        How long the other end may be away.
    """

    def __init__(self, asks: bool, patience_s: float) -> None:
        self.asks = asks
        self.state = "connected"
        self.reason = ""  # why it is away or over
        self._patience_s = patience_s
        self._attempt = 0  # of the asker's: the last that was begun, or that has come
        self._connected_by = 0  # the attempt that the present connection, or the last one, is from
        self._has_come = False  # while the old connection was not broken yet
        self._dialing = False
        self._trouble = ""
        self._pause_s = FIRST_PAUSE_S
        self._connected_s = -math.inf
        self._dial_s = self._deadline_s = math.inf

    @property
    def due_s(self) -> float:
        """When ``Tick`` has to be handled at the latest."""
        return min(self._dial_s, self._deadline_s)

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Return what has to be done about an event, in order.

        Raises
        ------
        ProtocolError
            The other end has done what is this one's to do; nothing has changed.
        """
        if isinstance(event, Came | Called) and isinstance(event, Called) is not self.asks:
            raise ProtocolError("the higher rank comes again, the lower rank calls for it")
        if self.state == "over":
            return [Deny(self.reason)] if isinstance(event, Came | Called) else []
        if isinstance(event, Spoilt | Denied):
            return self._give_up(event.reason if isinstance(event, Spoilt) else event.sentence)
        if isinstance(event, Left | Ended):
            commands = self._give_up(event.reason, left=isinstance(event, Left))
            return commands if isinstance(event, Left) else []
        if isinstance(event, Came):
            return self._came(event.attempt)
        if isinstance(event, Called):
            return self._called(event.attempt)
        if self.state == "connected":
            return self._broke(event, now_s) if isinstance(event, Broke) else []
        return self._while_away(event, now_s)

    def _broke(self, event: Broke, now_s: float) -> list[Command]:
        self.state, self.reason, self._trouble = "away", event.reason, ""
        self._deadline_s = event.since_s + self._patience_s
        if self._has_come:
            self._has_come = False
            return [Accept()]
        if now_s >= self._deadline_s:
            return self._time_is_over()
        self._pause_s = FIRST_PAUSE_S
        if now_s - self._connected_s >= STEADY_S:
            return self._dial()
        self._pause(now_s)
        return []

    def _while_away(self, event: Event, now_s: float) -> list[Command]:
        if isinstance(event, Resumed):
            self.state, self.reason = "connected", ""
            self._connected_by, self._connected_s = self._attempt, now_s
            self._dialing, self._dial_s, self._deadline_s = False, math.inf, math.inf
        elif isinstance(event, Refused):
            return self._give_up(f"its process has ended: nothing listens where it did ({self.reason})")
        elif isinstance(event, Missed | Heard):
            self._dialing = False
            self._trouble = event.reason if isinstance(event, Missed) else ""
            self._pause(now_s)
        elif isinstance(event, Tick):
            if now_s >= self._deadline_s:
                return self._time_is_over()
            if now_s >= self._dial_s:
                return self._dial()
        return []

    def _came(self, attempt: int) -> list[Command]:
        if attempt <= self._attempt:
            return [Deny("it has come again since")]
        self._attempt = attempt
        if self.state == "away":
            return [Accept()]
        self._has_come = True
        return [HangUp()]

    def _called(self, attempt: int) -> list[Command]:
        if self.state == "away":
            return [Answer()] if self._dialing else [Answer(), *self._dial()]
        return [Answer(), HangUp()] if attempt == self._connected_by else [Answer()]

    def _dial(self) -> list[Command]:
        self._dialing, self._dial_s = True, math.inf
        if self.asks:
            self._attempt += 1
        return [Dial(self._attempt)]

    def _pause(self, now_s: float) -> None:
        self._dial_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _time_is_over(self) -> list[Command]:
        trouble = f"; then {self._trouble}" if self._trouble else ""
        return self._give_up(f"it has been away for {self._patience_s:g} s: {self.reason}{trouble}")

    def _give_up(self, reason: str, left: bool = False) -> list[Command]:
        self.state, self.reason = "over", reason
        self._dialing, self._dial_s, self._deadline_s = False, math.inf, math.inf
        return [GiveUp(reason, left)]
