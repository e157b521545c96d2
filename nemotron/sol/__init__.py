"""How near each operation comes to what its device allows: its speed of light (SOL).

A problem is an operation at the sizes of a model. Its bound is the longer of its FLOPs at the
measured peak and its compulsory bytes at the measured bandwidth. The score of a backend is 1 at the
bound and 0.5 at the time of the readable reference.
"""
