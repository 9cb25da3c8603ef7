"""The report: one self-contained HTML page made from the content of an `evaluation.json`."""

from siss_diffusers.report.page import write_report


__all__ = ["write_report"]
