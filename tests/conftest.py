"""Nothing that a test starts looks at the network, and Ctrl-C works as in a terminal."""

import os
import resource
import signal

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell that runs the tests in the background lets them ignore SIGINT, and every process they start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Thousands of tests in one process leave more sockets and locks to the garbage collector than a login shell's 1,024.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(_soft, min(_hard, 8192)), _hard))

# A property is not a promise of speed: a slow disk or a busy machine must not fail it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
