"""Functions for the YAML files of this folder; their code is in `memdec.tasks.dcpmi` and `memdec.tasks.dcpmi_rows`."""

from memdec.tasks.dcpmi import DcpmiTask, dcpmi_results, largest_share
from memdec.tasks.dcpmi_rows import load_rows

__all__ = ["DcpmiTask", "dcpmi_results", "largest_share", "load_rows"]
