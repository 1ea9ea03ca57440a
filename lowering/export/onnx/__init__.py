"""ONNX: one node a site, a function of the file with a body of standard operators."""
