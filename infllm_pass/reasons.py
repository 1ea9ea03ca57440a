"""Why a site is switchable, or why it stays dense."""

from __future__ import annotations

from enum import Enum

from infllm_pass.lowering.ops.checks import DTYPES, MAX_HEAD_DIM


class Reason(Enum):
    """Why a site is switchable, or why it stays dense. The value says what would change it."""

    SWITCHABLE = "causal attention over its whole key length: dense below dense_len, sparse from there on"
    EXCLUDED = (
        "filter_fn or site_config turned this site down: let it return True, or a configuration, to make the site "
        "switchable"
    )
    BIDIRECTIONAL = (
        "every query sees every key, and only causal attention can be sparse: pass is_causal=True or a causal mask "
        "if that is what the model means"
    )
    UNPROVEN_MASK = (
        "what the mask computes could not be proved: build it in the graph from aranges, comparisons and a 2-D "
        "padding mask"
    )
    ADDITIVE_BIAS = (
        "numbers are added to the scores that are neither a mask nor a bias of row, key/value head and key alone: add "
        "0 and -inf (or torch.finfo(dtype).min), or numbers of keys"
    )
    WINDOW_WITHIN_BUDGET = (
        "its own sliding window is no longer than what sparse attention visits, so that dense attention within the "
        "window reads no more: lower topk or window_size if the site is to be sparse all the same"
    )
    NO_KEY_BIAS = (
        "agnostic_topk chooses blocks by the importance of their keys, and nothing is added to this site's scores that "
        "depends on the key: set agnostic_topk=0 for it, by site_config"
    )
    PARTIAL_KEYS = (
        "the queries are not provably the last of the keys that they see: let the mask compare key numbers with an "
        "arange plus a position, a 0-d tensor or one number a row, and let the same graph write keys there"
    )
    DROPOUT = "attention dropout is active: call eval() or set the dropout probability to 0"
    SCALE_IS_DATA = "the softmax scale is computed from data: use a number"
    HEAD_DIM = f"the head dimension is outside 1 to {MAX_HEAD_DIM}"
    HEAD_GROUPS = "the number of query heads is not a multiple of the number of key/value heads"
    SHAPES = "query, key and value are not [B, H, L, D] tensors of one batch size and key length"
    DATA_DEPENDENT_SIZE = (
        "a size that decides here comes from data: state what holds of it by torch._check in the model, or take it "
        "from a shape"
    )
    DTYPE = "the dtype is not one of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    DEVICE = "the operators run on CPU and CUDA tensors of one device"
    NESTED_GRAPH = "the call sits inside an operator that fixes what its body computes: move the attention out of it"
    FUNCTION_TRANSFORM = (
        "the operators have no rules for the transforms of torch.func and for forward-mode differentiation: take "
        "gradients by backward() or torch.autograd.grad, and write the batch as a dimension in the place of vmap"
    )
    CROSS_ATTENTION = (
        "queries and keys have lengths of their own and no causal mask relates them, as in attention to an encoder: "
        "only causal self-attention can be sparse"
    )
    SOFT_CAP = (
        "the scores are capped by a tanh in a way that sparse attention does not compute: cap them once, by a positive "
        "number, right after they are scaled and before anything is added to them"
    )
    SINK = (
        "a column is joined to the scores that is no attention sink: join one column that depends on the head alone, "
        "after all masks, and leave it out after the softmax"
    )
    RETURNED_WEIGHTS = (
        "the attention weights are used beside the output, and sparse attention makes none: do not ask for them "
        "(output_attentions=False, need_weights=False)"
    )
    SOFT_MASK = (
        "masked scores are set to a finite number, which leaves hidden keys a weight: fill with -inf or with "
        "torch.finfo(dtype).min"
    )
    OVERWRITTEN = (
        "queries, keys, values or scores are overwritten between being read and the end of the attention: write to "
        "them before or after it"
    )
    DETACHED = (
        "gradients are kept from a part of the attention: move detach() and no_grad() to before the product of queries "
        "and keys or to after the product with the values"
    )
    LAYOUT = (
        "the dimensions could not be told apart as batch, heads, queries and keys: write the attention as products "
        "of [B, H, L, D] tensors, or call scaled_dot_product_attention"
    )
    PARTIAL_MATCH = (
        "a softmax between two products looks like attention, but what lies between them is not followed: call "
        "scaled_dot_product_attention, or leave the scores to scaling, masking and softmax alone"
    )
    INTERNAL = "internal error of infllm_pass, the site runs as it was: please report it with the text below"


class Uncompiled(Enum):
    """Why a call of a sparsified model ran the plain model. The value says what would change it."""

    RECOMPILE_LIMIT = (
        "Dynamo has made as many graphs of a function as it may and runs it uncompiled where none of them fits: "
        "compile with dynamic=True or dynamic=None, or raise recompile_limit (an argument of torch.compile, or in "
        "torch._dynamo.config)"
    )
    STANCE = "torch.compiler.set_stance keeps Dynamo from compiling: call the model under the stance 'default'"
    DYNAMO_OFF = "Dynamo is turned off (TORCHDYNAMO_DISABLE or torch._dynamo.config.disable): turn it on"
    DISABLED = "the model's forward is marked with torch.compiler.disable: take the mark away"
    DISPATCH_MODE = (
        "Dynamo compiles nothing while a TorchDispatchMode is active, such as a counter of operations: leave the mode"
    )
    COMPILED_ELSEWHERE = (
        "the model was compiled by itself after it was sparsified (module.compile() or model.forward = "
        "torch.compile(...)): sparsify it again"
    )
    PART_COMPILED = (
        "a part that is compiled by itself is in none of the graphs, since something between it and the model breaks "
        "them, and runs as it was compiled: hand in the model without that compilation, or sparsify the part"
    )
    FORWARD_REPLACED = (
        "the forward of the sparsified model was replaced by a function that calls none of its compiled parts: let it "
        "call model.forward as it was, or parts of the model as attributes of the sparsified model"
    )
    NO_GRAPH = (
        "Dynamo made no graph of the call: TORCH_LOGS='+dynamo' says which frames it skipped; a call that computes "
        "nothing has none"
    )
