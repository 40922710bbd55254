"""Press one prompt into a gist without training the model: gradient descent on the slots alone."""

from gisting.distillation.distill import Distilled, Progress, distill

__all__ = ["Distilled", "Progress", "distill"]
