"""lm-eval tasks that are part of this package: this folder is on lm-eval's include path."""
