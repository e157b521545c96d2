"""Pairs for text correction: candidates of a recognizer or of noise, and the text that is right."""
