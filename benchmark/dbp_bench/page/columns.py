"""Which results stand behind a leaderboard's columns, and how its defenses rank."""

from typing import Final

from dbp_bench.comparable import KNOWN, NULL, WHITEBOX
from dbp_bench.leaderboard import Leaderboard, Row
from dbp_bench.pool import Pool
from dbp_bench.ranking import Standing, ranks_with_ties

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


def ranks(board: Leaderboard) -> dict[str, Standing]:
    """The standing of each defense that is ranked, controls not among them."""
    key = "hidden" if board.sort == "hidden" else "all_known"
    pools = {
        row.defense: pool
        for row in board.rows
        if row.kind == "defense" and (pool := serving(row, key)) is not None
    }
    return ranks_with_ties({name: pool.score() for name, pool in pools.items()})
