"""Checkpoints of the original authors and of transformers in our names, and back."""
