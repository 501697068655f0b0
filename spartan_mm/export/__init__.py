"""Models for other runtimes: ONNX, OpenVINO and more, with everything inside and checked."""
from .job import Job, export_model

__all__ = ['Job', 'export_model']
