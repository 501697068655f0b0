"""What a model does inside: its layers, where it looks, how far, and at which frequencies."""
