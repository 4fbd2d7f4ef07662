"""What a run tells people: the run log (JSONL), progress lines, tables, one HTML page, trackers, lineage.

The log is the only source; every view is made from its rows (`log.py` describes them), so a page can be rebuilt at
any time from the run folder. Nothing here imports torch.
"""

from rayft.report.log import RunLog, read_log

__all__ = ["RunLog", "read_log"]
