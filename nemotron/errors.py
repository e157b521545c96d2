"""The one exception that means "the user's input was wrong"."""


class UserError(Exception):
    """A mistake in what the user gave: one sentence that says what, where and what would be right.

    The command line prints the sentence and exits with 2; no traceback is shown.
    """
