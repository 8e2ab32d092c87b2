"""Latency, throughput, memory, utilisation and work of generation."""
