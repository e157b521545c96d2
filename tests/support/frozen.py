"""Imported last by the fork server: no collection of garbage visits what it has imported.

Else each takes 0.2 s of a core in each process forked from it, and copies the pages it visits.
"""

import gc

gc.collect()
gc.freeze()
