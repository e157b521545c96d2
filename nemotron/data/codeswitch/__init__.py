"""Code-switched text: made from text of one language, or of two, and measured."""
