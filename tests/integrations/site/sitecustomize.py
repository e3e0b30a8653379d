"""Lets PyPI's torchvision, whose operators want CUDA, be imported beside a CPU build of torch.

PyPI has no other for Linux; open_clip, timm and Transformers import it. On PYTHONPATH it serves child processes too.
"""

import sys
from importlib.metadata import version

_libraries = []


class _DeclareOperators:
    """Before torchvision is imported, declares the operators that its Python code registers fakes for."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision" and not _libraries:
            import torch

            if torch.version.cuda is None and "+cpu" not in version("torchvision"):
                library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _libraries.append(library)


sys.meta_path.insert(0, _DeclareOperators())
