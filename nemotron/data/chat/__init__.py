"""Conversations: the chat template, and the rendering of rows with it."""
