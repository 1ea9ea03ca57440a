"""Nested structures of inputs and outputs, as ``torch.export`` writes them down.

``torch.utils._pytree`` and ``torch.export._tree_utils``, the same in torch 2.11 to 2.15. Nothing public reads the
structures that exported programs hold.
"""

from __future__ import annotations

from torch.export._tree_utils import reorder_kwargs
from torch.utils._pytree import tree_leaves, tree_structure, treespec_loads

__all__ = ["reorder_kwargs", "tree_leaves", "tree_structure", "treespec_loads"]
