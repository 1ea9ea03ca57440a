"""Export formats: the fused operator, ONNX functions, TensorRT plugins."""
