"""Number formats, applied to a built model."""
