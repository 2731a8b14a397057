"""How good a compiled model is: against its float model as a whole (evaluate) and layer by layer (diagnose)."""

from qcompile.evaluation.comparison import evaluate as evaluate
from qcompile.evaluation.diagnosis import Diagnosis as Diagnosis
from qcompile.evaluation.diagnosis import LayerRow as LayerRow
from qcompile.evaluation.diagnosis import diagnose as diagnose
from qcompile.evaluation.results import Evaluation as Evaluation
