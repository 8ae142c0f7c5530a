"""The processes of a run: join and leave, agree, share the work."""

from remixdit.distributed.ranks import (
    Ranks,
    agree,
    all_reduce,
    barrier,
    lose_patience,
    num_ranks,
    pick_device,
    start,
    stop,
)

__all__ = [
    "Ranks",
    "agree",
    "all_reduce",
    "barrier",
    "lose_patience",
    "num_ranks",
    "pick_device",
    "start",
    "stop",
]
