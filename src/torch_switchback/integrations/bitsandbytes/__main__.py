"""Run an unmodified program with SwitchBackLinear in bitsandbytes.

python -m torch_switchback.integrations.bitsandbytes -m some.module args…
python -m torch_switchback.integrations.bitsandbytes script.py args…
"""

import os
import runpy
import sys

from . import install_as_bitsandbytes

_USAGE = (__doc__ or "").partition("\n\n")[2]


def main(arguments: list[str]) -> None:
    """Run ``-m module`` or a script as ``__main__``, its own sys.argv and sys.path in place."""
    as_module = arguments[:1] == ["-m"]
    program = arguments[1:] if as_module else arguments
    if not program or program[0].startswith("-"):
        sys.exit(f"usage:\n{_USAGE}")
    install_as_bitsandbytes()
    sys.argv = program
    if not getattr(sys.flags, "safe_path", False):  # python -P puts nothing there
        sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.abspath(program[0]))
    if as_module:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
