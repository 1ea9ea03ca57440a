"""What operators compute, whatever their spelling: the vocabulary of `op_table`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Kind(Enum):
    """What an operator computes."""

    ATTENTION = auto()
    ARANGE = auto()
    FULL = auto()
    NEG = auto()
    ABS = auto()
    ADD = auto()
    SUB = auto()
    MUL = auto()
    FLOORDIV = auto()
    EQ = auto()
    NE = auto()
    LT = auto()
    LE = auto()
    GT = auto()
    GE = auto()
    AND = auto()
    OR = auto()
    NOT = auto()
    WHERE = auto()
    CAST = auto()
    IDENTITY = auto()
    DETACH = auto()
    GETITEM = auto()
    UNSQUEEZE = auto()
    EXPAND = auto()
    RESHAPE = auto()
    TRANSPOSE = auto()
    PERMUTE = auto()
    REPEAT = auto()
    REPEAT_INTERLEAVE = auto()
    DIFF = auto()
    CUMSUM = auto()
    DIV = auto()
    MATMUL = auto()
    BADDBMM = auto()
    EINSUM = auto()
    SOFTMAX = auto()
    DROPOUT = auto()
    MASKED_FILL = auto()
    TANH = auto()
    EXP = auto()
    EXP2 = auto()
    SIGMOID = auto()
    LOG_SUM_EXP = auto()
    LOG_ADD_EXP = auto()
    SQRT = auto()
    POW = auto()
    CAT = auto()
    MAX = auto()
    CLAMP = auto()
    SIZE = auto()
    CHECK = auto()
    SCALAR_TENSOR = auto()
    FLEX_ATTENTION = auto()
    MULTI_HEAD_ATTENTION = auto()
    ENCODER_LAYER = auto()
    XOR = auto()
    TRIL = auto()
    TRIU = auto()
    PAD = auto()
    HIDE_DIM = auto()
    SHOW_DIM = auto()
    COS = auto()
    SIN = auto()
    STACK = auto()
    SPLIT = auto()
    UNBIND = auto()
    OUTER = auto()
    GATHER = auto()
    EMBEDDING = auto()
    POLAR = auto()
    COMPLEX = auto()
    VIEW_AS_COMPLEX = auto()
    VIEW_AS_REAL = auto()


@dataclass(frozen=True)
class Call:
    """A node read through the table: what it computes and its arguments by name."""

    kind: Kind
    args: dict[str, Any]
