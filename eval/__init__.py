"""Metrics, SAEBench-compatible results and the report.

Rooms: `core` (reconstruction), `hierarchy` (composition and its nulls), `suite` (SAEBench's evaluations from probe stores), `autointerp`,
`unlearning`, `synthetic` (known truth), `report`. `core` is what the others build on; `report` reads what they wrote.
"""
