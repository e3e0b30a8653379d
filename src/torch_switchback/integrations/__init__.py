"""Bridges to other libraries. They use the public API alone, and import their library when they are called."""
