"""Which account a public job belongs to: asked of Postgres once, because it never changes while the job lives."""

from __future__ import annotations

from typing import Final

from service.stores.job_table import JobTable

CAPACITY: Final = 100_000


class PublicMemory:
    """Account ids of public jobs by job id. Unknown ids are not remembered: they are limited by address instead."""

    def __init__(self, table: JobTable) -> None:
        self._table = table
        self._accounts: dict[str, int] = {}

    async def account_of(self, job_id: str) -> int | None:
        """None where no public job has this id. Raises Unavailable."""
        account_id = self._accounts.get(job_id)
        if account_id is None:
            account_id = await self._table.public_account(job_id)
            if account_id is not None:
                if len(self._accounts) >= CAPACITY:
                    del self._accounts[next(iter(self._accounts))]
                self._accounts[job_id] = account_id
        return account_id
