"""Explain what runs in a model's layers, and recommend which to convert on this machine."""
