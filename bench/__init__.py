"""Measurements: `make bench` runs every row beside a peer in the same run, and writes `bench/results/latest.json`.

`python -m bench --help` says how to run some rows, or a small scale. What each row means: docs/benchmarks.md.
"""
