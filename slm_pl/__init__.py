"""slm_pl makes a causal language model smaller and faster, and shows what that cost."""

__version__ = "0.1.0"
