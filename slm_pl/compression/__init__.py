"""Deciding what to remove from a model (plan), and removing it (surgery)."""
