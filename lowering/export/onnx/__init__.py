"""ONNX export: one node per site, with a model-local function of standard operators as its body."""
