"""The record of a run: folder, event log, progress, report."""
