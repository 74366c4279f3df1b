"""Write ``report.html``: the settings, results and costs of a run on one self-contained page."""

from fedmitr_flwr.results.finished_run import FinishedRun, load_run
from fedmitr_flwr.results.report.compare import comparison_page
from fedmitr_flwr.results.report.render import run_page, write_page, write_run_report
from fedmitr_flwr.runs.directory import REPORT

__all__ = ["REPORT", "FinishedRun", "comparison_page", "load_run", "run_page", "write_page", "write_run_report"]
