"""Nothing that a test starts looks at the network, and Ctrl-C works as in a terminal."""

import os
import signal

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell that runs the tests in the background lets them ignore SIGINT, and every process they start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A property is not a promise of speed: a slow disk or a busy machine must not fail it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
