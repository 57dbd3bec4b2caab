"""What this worker holds of others, and what others hold of it: counted, and let go of."""

from __future__ import annotations

import time

from fastref.runtime.rules import RuleKeeper

__all__ = ["Holdings"]


class Holdings(RuleKeeper):
    """The part of a runtime that looks at references as a whole."""

    def delete_user_references(self) -> None:
        """Let go of every value that lives elsewhere; handles on them can only be dropped from here on."""
        self.users_deleted = True
        self.on_their_way.clear()
        for peer in self.known_peers():
            if peer.rank != self.rank:
                peer.detach()  # leases are holds like others; what the program still reads must not change
                peer.holder.let_all_go()
                self.delete_what_is_gone(peer)

    def wait_for_others_to_let_go(self, timeout_s: float) -> bool:
        """Wait until nobody else holds a value that lives here; False when somebody does after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self.references_of_others():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def references_of_others(self) -> dict[int, list[int]]:
        """Return which values here others still hold: entry -> ranks; -1 stands for those who hold by messages."""
        self.sweep()
        held = {}
        for index, entry in self.table.snapshot()["entries"].items():
            ranks = [rank for rank in range(self.bits) if entry["word"] >> rank & 1]
            if entry["word"] >> 62 & 1:
                ranks.append(-1)
            if ranks and index not in self.credit_of and index < len(self.owned) and self.owned[index] is not None:
                held[index] = ranks
        return held

    def reference_counts(self) -> dict[str, int]:
        """Return torch's counters of references.

        Returns
        -------
        dict
            ``num_owner_rrefs``: values here that others hold; ``num_forks``: their holders; ``num_pending_users``:
            values elsewhere that are held here and are not there yet, or whose owner has not answered a request for a
            fork; ``num_pending_futures``: bookkeeping frames that wait for room in a ring.
        """
        held = self.references_of_others()
        elsewhere = [peer for peer in self.known_peers() if peer.rank != self.rank]
        with self._rules:
            abroad, waiting = self._owner_forks.holders(), self._user_forks.waiting()
        forks = sum(rank >= 0 for ranks in held.values() for rank in ranks)
        return {
            "num_owner_rrefs": len(held),
            "num_forks": forks + sum(count for index, count in abroad.items() if index in held),
            "num_pending_users": sum(peer.holder.pending() for peer in elsewhere if not peer.is_dead) + waiting,
            "num_pending_futures": sum(peer.snapshot()["outgoing"] for peer in elsewhere),
        }
