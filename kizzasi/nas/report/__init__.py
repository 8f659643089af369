"""Reports: tables, figures and sentences from the numbers of a run, and the winner's own folder."""

from kizzasi.nas.report.pages import summarise, table, write_report

__all__ = ["summarise", "table", "write_report"]
