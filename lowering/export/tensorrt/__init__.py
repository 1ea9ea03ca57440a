"""TensorRT: the plugin, engines that use it, and the Torch-TensorRT converter."""
