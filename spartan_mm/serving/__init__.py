"""A server for detectors and classifiers: pictures in, JSON out. ``spartan-mm serve`` starts it."""
from .app import make_app
from .batching import Batcher
from .limits import Limits, Refusal
from .models import load_served
from .server import serve

__all__ = ['Batcher', 'Limits', 'Refusal', 'load_served', 'make_app', 'serve']
