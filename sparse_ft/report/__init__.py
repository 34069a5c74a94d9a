"""The report of a run as one HTML file."""

from .html import write_report

__all__ = ["write_report"]
