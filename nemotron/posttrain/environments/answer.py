"""Finds the part of an answer that a verifier compares."""

BOX = "\\boxed{"
TEXT = ("\\text{", "\\mathrm{", "\\textbf{", "\\mathbf{")


def last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{}`, with nested braces; None without a closed one.

    A box that is opened later and never closed counts as the last one, so that an answer that was
    cut off is not read as an earlier guess.
    """
    start = text.rfind(BOX)
    return None if start < 0 else _up_to_brace(text[start + len(BOX) :])


def without_text(content: str) -> str:
    """Return what stands inside `\\text{}` and its relatives, if nothing stands outside."""
    content = content.strip()
    for name in TEXT:
        if content.startswith(name) and content.endswith("}"):
            inner = _up_to_brace(content[len(name) :])
            if inner is not None and len(inner) == len(content) - len(name) - 1:
                return without_text(inner)
    return content


def _up_to_brace(text: str) -> str | None:
    """Return the text before the brace that closes one opened just before it."""
    depth = 1
    for place, character in enumerate(text):
        escaped = place > 0 and text[place - 1] == "\\"
        depth += {"{": 1, "}": -1}.get(character, 0) * (not escaped)
        if depth == 0:
            return text[:place]
    return None
