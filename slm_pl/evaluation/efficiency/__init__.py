"""Latency, throughput, memory, utilisation and work of generation, alone and in turn with a baseline."""
