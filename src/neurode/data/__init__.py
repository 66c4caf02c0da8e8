"""Data sets: generators with known answers."""

from neurode.data.spirals import bayes_accuracy, spirals

__all__ = ["bayes_accuracy", "spirals"]
