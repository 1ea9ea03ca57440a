"""Parse an ONNX file with TensorRT for RTX and build an engine; what was seen goes to standard output as JSON.

``python -m tests.tensorrt_build FILE plugin|body``. A process of its own, because the parser wants to find its library
under a name without a version, which has to be on the library path when a process starts.
"""

import json
import sys

import tensorrt_rtx as trt

from infllm_pass.lowering.node import NAME
from infllm_pass.lowering.tensorrt import register_plugin


def main(path: str, how: str) -> dict:
    logger = trt.Logger(trt.Logger.ERROR)
    if how == "plugin":
        register_plugin(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    seen = {"parsed": parser.parse_from_file(path)}
    seen["errors"] = [str(parser.get_error(number)) for number in range(parser.num_errors)]
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    plugins = [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    seen["plugins"] = [layer.name for layer in plugins]
    seen["loops"] = sum(layer.type == trt.LayerType.TRIP_LIMIT for layer in layers)
    seen["dynamic"] = [list(network.get_input(number).shape) for number in range(network.num_inputs)]
    if how == "plugin":
        settings, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for number in range(network.num_inputs):
            profile.set_shape(network.get_input(number).name, (1, 2), (1, 200), (4, 1024))
        settings.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, settings)
        seen["named_in_engine"] = engine is not None and bytes(engine).count(NAME.encode())
    return seen


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
