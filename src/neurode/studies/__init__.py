"""Runnable experiments: each has a dataclass of settings and a `run`."""
