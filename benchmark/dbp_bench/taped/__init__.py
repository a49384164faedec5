"""Somebody else's torch module under a tape: what it draws inside comes from the noise."""

from dbp_bench.taped.purifier import Taped
from dbp_bench.taped.record import Drawn, Record

__all__ = ["Drawn", "Record", "Taped"]
