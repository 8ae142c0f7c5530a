"""The processes of a run: join and leave, agree, share the work."""

from remixdit.distributed.ranks import Ranks, all_reduce, barrier, pick_device, start, stop

__all__ = ["Ranks", "all_reduce", "barrier", "pick_device", "start", "stop"]
