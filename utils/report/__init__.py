"""The report of runs: one page of HTML from what their folders hold."""
