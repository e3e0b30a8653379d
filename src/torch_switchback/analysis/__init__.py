"""What runs in a model's layers, and which are worth converting on this machine."""
