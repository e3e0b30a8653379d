"""Bridges to other libraries. They use the public API alone, and import their library on import or on call."""
