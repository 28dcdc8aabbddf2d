"""New images through a saved run.

``images.py`` says what is to be predicted, ``model.py`` rebuilds the run's model by the recipe it kept, ``run.py`` puts
the two together.
"""

from embcache.predict.run import Predictions, predict_images

__all__ = ["Predictions", "predict_images"]
