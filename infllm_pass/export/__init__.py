"""Models that leave Python: exported programs, ONNX, AOTInductor packages, TensorRT."""
