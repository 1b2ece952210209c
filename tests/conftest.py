"""Nothing that a test starts looks at the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
