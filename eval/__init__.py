"""Metrics, SAEBench-compatible results and the report."""
