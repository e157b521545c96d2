"""Limits that hold for a command's options and for a recipe's keys alike."""

MOST_TASKS = 1_000_000
"""Rows of a task that a model is asked."""
MOST_SAMPLES = 100_000
"""Answers to each row."""
MOST_TOKENS = 1 << 22
"""Tokens of a prompt or an answer."""
MOST_ROWS = 1 << 16
"""Rows of text from which a quantization is decided."""
MOST_CHATS = 1_000_000_000
"""Conversations that are written into a file."""
MOST_MIB = 1 << 20
"""Size of a row of a file, in MiB."""
