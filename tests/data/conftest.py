from hypothesis import settings

# A deadline measures the other programs on the machine, not the code.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
