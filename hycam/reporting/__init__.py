"""A study's figures and analyses: what needs its models is measured once and kept, the rest drawn from records."""

from hycam.reporting.report import Report, write_report

__all__ = ["Report", "write_report"]
