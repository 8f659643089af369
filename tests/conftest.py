"""Settings of the whole suite."""

from hypothesis import settings

# Machines are shared and slow at times; a test is wrong when its claim is, not when it is late.
settings.register_profile("kizzasi", deadline=None)
settings.load_profile("kizzasi")
