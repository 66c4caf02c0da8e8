"""The spiral classifier: three models, what they reach, and what a neural ODE is and is not."""

from neurode.studies.spirals.run import run
from neurode.studies.spirals.settings import Settings

__all__ = ["Settings", "run"]
