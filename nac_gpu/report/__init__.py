"""What a compression did, measured: as a page, as text, as JSON."""

from nac_gpu.report.contents import Report
from nac_gpu.report.make import report

__all__ = ["Report", "report"]
