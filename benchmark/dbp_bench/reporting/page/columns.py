"""Which results stand behind a leaderboard's columns."""

from typing import Final

from dbp_bench.reporting.leaderboard import Row
from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.records import KNOWN, NULL, WHITEBOX

_THREATS: Final = {key: threat for key, (threat, _) in KNOWN.items()} | {
    WHITEBOX: WHITEBOX,
    NULL: NULL,
}


def serving(row: Row, key: str) -> Pool | None:
    """The result that a column shows; null where there is none."""
    if row.estimates[key] is None:
        return None
    if key == "clean":
        return max(row.pools, key=lambda pool: pool.draws)
    threat = row.served_by.get(key, _THREATS[key])
    return next((pool for pool in row.pools if pool.any.threat == threat), None)
