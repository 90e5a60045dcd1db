"""What a run trains: one objective a file, each a loss that reads like its paper and a record."""

from lcm_jax.objectives.autoencoder import AUTOENCODER
from lcm_jax.objectives.base import Objective
from lcm_jax.objectives.denoising import DENOISING
from lcm_jax.objectives.lcd import LCD

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (LCD, DENOISING, AUTOENCODER)}

__all__ = ["OBJECTIVES", "Objective"]
