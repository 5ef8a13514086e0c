"""How much may still be asked for: what is charged, plus what is reserved for requests whose price is not known yet."""

from __future__ import annotations

import threading

from afd_data.errors import UserError
from afd_data.journal import Journal
from afd_data.teachers import Identity

ROUNDING = 1e-9  # 3 x 0.1 is more than 0.3 in binary


def open_budget(limit: float | None, estimate: float, identity: Identity, journal: Journal) -> Budget:
    """What a run may spend, given what the journal says was spent; `estimate` is the teacher's, of one request.

    Raises UserError when `limit` cannot be kept: no price is known, or money of another currency was spent.
    """
    spend = journal.spend()
    if limit is not None and identity.paid:
        if estimate == 0:
            raise UserError(
                f"cache.max_cost={limit:g} cannot be kept: what a video of {identity.name} costs is not known. "
                "Set teacher.price (or the price its provider bills by)."
            )
        if others := [currency for currency, sums in spend.items() if currency != identity.currency and any(sums)]:
            raise UserError(
                f"cache.max_cost={limit:g} cannot be kept: it is in {identity.currency}, and this cache has spent "
                f"{others[0]} too. Set teacher.currency back, or cache into another folder with --set out=FOLDER."
            )
    return Budget(limit, sum(spend.get(identity.currency, ())), max(estimate, highest_cost(journal, identity.currency)))


def highest_cost(journal: Journal, currency: str) -> float:
    """What the dearest request since the newest round began cost; 0.0 where none did.

    Those before it may have been another teacher's; looking up the samples of them all would take a minute.
    """
    query = (
        "SELECT max(cost) FROM requests WHERE currency = ? "
        "AND intent_at >= (SELECT started_at FROM rounds ORDER BY generation DESC LIMIT 1)"
    )
    return journal.select(query, (currency,))[0][0] or 0.0


def booked(told: float | None, estimate: float, paid: bool) -> float | None:
    """What a request cost, given what its teacher told, if it did; None: something, and nobody knows what."""
    cost = estimate if told is None else told
    return None if told is None and cost == 0 and paid else cost


class Budget:
    """A limit in the teacher's currency; None: none.  Thread-safe.

    spent: what was charged or reserved before.  price: what a request is expected to cost; as soon as one costs more,
    that is reserved for every request that is under way, and for the next.
    """

    def __init__(self, limit: float | None, spent: float = 0.0, price: float = 0.0) -> None:
        self.limit = limit
        self.price = price
        self._known = spent
        self._under_way = 0
        self._lock = threading.Lock()

    @property
    def spent(self) -> float:
        """Charged or reserved."""
        return self._known + self._under_way * self.price

    def reserve(self) -> bool:
        """Set the price of one more request aside, if it fits."""
        with self._lock:
            if self.limit is not None and self.spent + self.price > self.limit + ROUNDING:
                return False
            self._under_way += 1
            return True

    def settle(self, charged: float) -> None:
        """Replace what was set aside for a request by what it cost; 0.0: it was not sent."""
        with self._lock:
            self._under_way -= 1
            self._know(charged)

    def correct(self, estimate: float, charged: float) -> None:
        """A request from before, of which `spent` held the estimate, cost this."""
        with self._lock:
            self._know(charged)
            self._known -= estimate

    def _know(self, charged: float) -> None:
        self._known += charged
        self.price = max(self.price, charged)


class Streak:
    """Counts failures that follow one another; a success starts anew.  Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.last = ""
        self.broken = False  # whether there were too many; what succeeds after that was under way before
        self._count = 0
        self._lock = threading.Lock()

    def failed(self, reason: str) -> None:
        """One more."""
        with self._lock:
            if not self.broken:
                self._count, self.last = self._count + 1, reason
                self.broken = self._count >= self.limit

    def succeeded(self) -> None:
        """Something worked."""
        with self._lock:
            self._count = 0
