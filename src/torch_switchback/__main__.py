"""``python -m torch_switchback`` is the command ``torch-switchback``."""

from .cli import main

main()
