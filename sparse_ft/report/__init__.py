"""The report of a run, and of many side by side, each as one HTML file."""

from .gallery import find_runs, write_gallery
from .html import write_report

__all__ = ["find_runs", "write_gallery", "write_report"]
