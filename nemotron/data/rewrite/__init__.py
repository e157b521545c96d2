"""Commands that make files from rows of text: noise, demo data, tokenizers of characters."""
