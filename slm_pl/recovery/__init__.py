"""Training after compression: what is trained, what is minimised, and how it becomes an ordinary model again."""
