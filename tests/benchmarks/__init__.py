"""Benchmarks: ``make bench``. They take minutes and depend on the machine, so no test runs them."""
