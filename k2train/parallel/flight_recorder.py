"""Flight recorder: the last collectives of this process as torch has recorded them, for reports.

- torch keeps the last operations of NCCL and gloo in a ring (TORCH_FR_BUFFER_SIZE, set by
  `launch.environment_defaults`): kind, group, sizes, and whether each was begun and completed.
- The tracker of this package says where the host is. What the device has not completed, only the
  recorder knows.
- Written as JSON when the watchdog ends a run that hangs, one file a rank.

Alternatives considered:
- torch's own dump at NCCL's timeout: pickled, minutes later, and not where the report is.
"""

import json

from torch._C import _distributed_c10d as recorders

DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""torch's functions, the one with NCCL's operations first; builds without NCCL lack it."""
KEPT = 200
"""Operations that are over and still in a recording."""


def flight_recording() -> bytes | None:
    """Return the recorded operations as JSON; None where torch has no recorder. Never raises.

    Of the operations that are over only the last `KEPT` are in it: every rank of a large run writes
    its own, to one file system.
    """
    for name in DUMPS:
        dump = getattr(recorders, name, None)
        if dump is None:
            continue
        try:
            recorded = json.loads(dump())
            entries = recorded["entries"]
            first_kept = len(entries) - KEPT
            recorded["entries"] = [
                entry
                for number, entry in enumerate(entries)
                if number >= first_kept or not entry.get("retired", False)
            ]
            return json.dumps(recorded).encode()
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):
            # A diagnosis must not fail because another version records something else.
            continue
    return None
