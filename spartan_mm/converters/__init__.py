"""Converters of the original authors' checkpoints: pure functions from state dict to state dict."""
