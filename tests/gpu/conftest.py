import torch

# What only a GPU can show. The tests beside this folder run there too: ``pytest --device cuda``.
collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
