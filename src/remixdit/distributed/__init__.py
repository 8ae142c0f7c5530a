"""The processes of a run: join and leave, agree, share the work."""

from remixdit.distributed.ranks import (
    Ranks,
    Wishes,
    agree,
    all_reduce,
    barrier,
    by_shares,
    num_ranks,
    pick_device,
    start,
    stop,
)

__all__ = [
    "Ranks",
    "Wishes",
    "agree",
    "all_reduce",
    "barrier",
    "by_shares",
    "num_ranks",
    "pick_device",
    "start",
    "stop",
]
