"""The tests, as a package that imports without the checkout on the path of modules.

``python -m`` puts the working folder there, where ``kernels/`` and others would be found in place of installed packages
of the same names, such as the ``kernels`` that transformers asks for. This package is imported first, and takes it off.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != os.path.realpath(_ROOT)]
