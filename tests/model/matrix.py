"""How much of the matrices of layouts is computed: all where ``OVR_TEST_WHOLE`` is set, as in tests/soak.sh.

Otherwise a choice in which each kind of parallelism, and each pair that meets in one collective, is there once.
"""

import os

WHOLE = bool(os.environ.get("OVR_TEST_WHOLE"))
