"""The operators in other formats: one fused operator, ONNX functions, TensorRT plugins."""
