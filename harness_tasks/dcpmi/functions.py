"""Functions that the YAML beside this file names; the code is in `memdec.dcpmi` and `memdec.dcpmi_rows`."""

from memdec.dcpmi import DcpmiTask, dcpmi_results, largest_share
from memdec.dcpmi_rows import load_rows

__all__ = ["DcpmiTask", "dcpmi_results", "largest_share", "load_rows"]
