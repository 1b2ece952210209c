"""Property tests here have no deadline: a first example that imports a library is not a failure."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
