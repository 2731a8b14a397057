"""The passes: one file each. See `qcompile.passes.base` for what a pass is."""

from qcompile.passes.base import Context, Pass
from qcompile.passes.pipelines import Pipeline, default_pipeline, float_pipeline, qdq_pipeline

__all__ = ["Context", "Pass", "Pipeline", "default_pipeline", "float_pipeline", "qdq_pipeline"]
