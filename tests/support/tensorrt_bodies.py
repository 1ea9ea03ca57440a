"""Parse an ONNX file with TensorRT for RTX, no plugin registered; what was seen goes to standard output as JSON.

``python -m tests.support.tensorrt_bodies FILE``: a process of its own: others may have registered the plugin, and
the parser wants to find its library under a name without a version, which has to be on the library path when a
process starts.
"""

import json
import sys

import tensorrt_rtx as trt


def main(path: str) -> dict:
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    seen = {"parsed": parser.parse_from_file(path)}
    seen["errors"] = [str(parser.get_error(number)) for number in range(parser.num_errors)]
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    seen["plugins"] = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    seen["loops"] = sum(layer.type == trt.LayerType.TRIP_LIMIT for layer in layers)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
