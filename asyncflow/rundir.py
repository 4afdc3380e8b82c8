"""Names of the files in a run directory."""

from __future__ import annotations

CONFIG = "config.json"
"""The resolved configuration."""
METRICS = "metrics.jsonl"
"""One JSON object a line."""
LEDGER = "ledger.sqlite"
"""Every decision of the store."""
SUMMARY = "summary.json"
"""How the run ended."""
WEIGHTS = "weights"
"""Folder of the final weights in Hugging Face format."""
REPORT = "report.html"
