"""Thousands of LoRA fine-tunes of one base model, served from one JAX program on one page pool."""

from sloraj.completion import Choice, Completion
from sloraj.config import EngineConfig
from sloraj.engine import Engine
from sloraj.errors import SlorajError
from sloraj.frontend_api import AdapterInfo, ModelInfo, RequestOutput
from sloraj.launch import start_frontend
from sloraj.request import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AdapterInfo",
    "Choice",
    "Completion",
    "Engine",
    "EngineConfig",
    "ModelInfo",
    "RequestOutput",
    "SamplingParams",
    "SlorajError",
    "__version__",
    "start_frontend",
]
