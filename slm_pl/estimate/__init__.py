"""What a config costs before it is run: operations, bytes, memory and time of search, recovery and evaluation."""
