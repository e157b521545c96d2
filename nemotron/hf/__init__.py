"""Hugging Face folders: names, config.json, import and export."""
