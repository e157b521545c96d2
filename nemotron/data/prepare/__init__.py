"""From text to shards: what is read, how it becomes tokens, who does it, what is written."""
