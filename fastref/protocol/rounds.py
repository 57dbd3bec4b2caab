"""When all workers may end: rounds in which each says that it is idle and how many calls it has sent and served.

A worker that says it is idle may be called again by one that was not. So the job is quiet only when two rounds in a row
had the same totals and no call was under way between them: as many served as sent. (The counting method for termination
detection, F. Mattern, "Algorithms for distributed termination detection", 1987.)
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Rounds", "Report"]


@dataclass(frozen=True)
class Report:
    """What one worker says in one round; ``checks``: it wants a look at what is held, when all is quiet."""

    number: int
    sent: int
    served: int
    checks: bool = False


class Rounds:
    """One worker's view of the rounds.

    Parameters
    ----------
    me : int
        This worker's rank.
    live : set of int
        Ranks of all that live, this one included.
    """

    def __init__(self, me: int, live: set[int]) -> None:
        self.me, self.live = me, set(live)
        self.number = 0
        self._reports: dict[int, dict[int, Report]] = {}
        self._totals: list[tuple[int, int]] = []
        self._deaths = 0

    def report(self, sent: int, served: int, checks: bool = False) -> Report:
        """This worker is idle: begin its next round. Only after ``is_over`` said that the last one is."""
        self.number += 1
        report = Report(self.number, sent, served, checks)
        self.heard(self.me, report)
        return report

    def heard(self, rank: int, report: Report) -> None:
        """A worker has said it is idle."""
        self._reports.setdefault(report.number, {})[rank] = report

    def died(self, rank: int) -> None:
        """Nobody waits for a dead worker."""
        self.live.discard(rank)
        self._deaths += 1

    def missing(self, number: int | None = None) -> set[int]:
        """Who has not reported in a round; by default the current one."""
        return self.live - set(self._reports.get(self.number if number is None else number, {}))

    def is_over(self) -> bool:
        """True when all that live have reported in the current round."""
        return not self.missing()

    def checking(self) -> set[int]:
        """Who wants to look at what is held, of those who have reported in the current round."""
        return {rank for rank, report in self._reports.get(self.number, {}).items() if report.checks}

    def is_quiet(self) -> bool:
        """True when the job is quiet; call it once for each round that is over."""
        reports = self._reports.get(self.number, {}).values()
        totals = (sum(r.sent for r in reports), sum(r.served for r in reports))
        self._totals.append(totals)
        if len(self._totals) < 2 or self._totals[-1] != self._totals[-2]:
            return False
        # What a dead worker sent or served is not in the sums any more.
        return totals[0] == totals[1] or self._deaths > 0
