"""Command line, benchmarks, memory measurement, demo data."""
