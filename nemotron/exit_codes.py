"""The exit codes of every command, and what each means."""

DONE = 0
FAILED = 1
WRONG_INPUT = 2
INTERNAL_ERROR = 70
"""EX_SOFTWARE of sysexits.h."""
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: it asks a scheduler to start the same command again."""
INTERRUPTED = 130
"""What a shell reports for a program that SIGINT ended."""

MEANINGS = {
    DONE: "done",
    FAILED: "the work failed, or a check found a fault",
    WRONG_INPUT: "a mistake in the input; one sentence says where it is and what is right",
    INTERNAL_ERROR: "an internal error, which is a fault of this program; please report it",
    STOPPED: "a run was stopped and saved; train --resume continues it",
    INTERRUPTED: "interrupted by Ctrl-C",
}
