"""Public names, and where they live; `__init__.py` resolves them on first use."""

from . import archs as archs
from . import attacks as attacks
from . import detectors as detectors
from . import purifiers as purifiers
from . import testing as testing
from ._data.dataset import Dataset as Dataset
from ._data.images import ImageEncoder as ImageEncoder
from ._detection.audit import Audit as Audit
from ._detection.audit import audit as audit
from ._errors import UnbackdoorError as UnbackdoorError
from ._evaluation.evaluate import evaluate as evaluate
from ._mixing.stream import purify_stream as purify_stream
from ._models.loading import load as load
from ._models.saving import save as save
from ._poisoning.poison import poison as poison
from ._poisoning.trigger import Trigger as Trigger
from ._purification.purify import Purified as Purified
from ._purification.purify import purify as purify
from ._purification.run import Run as Run
from ._stress.result import Stress as Stress
from ._stress.stress import stress as stress
from ._tasks.proportion import Proportion as Proportion
from ._tasks.score import Score as Score
from ._victims.plant import Victim as Victim
from ._victims.plant import plant as plant
from ._victims.recipe import VictimRecipe as VictimRecipe
