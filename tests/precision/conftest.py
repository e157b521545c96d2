"""Properties are about values: an example may take long when others use the cores."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
