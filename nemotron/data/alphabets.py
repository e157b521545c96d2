"""Which scripts the letters of a language belong to."""

HAN, LATIN, CYRILLIC = ("CJK",), ("LATIN",), ("CYRILLIC",)
ARABIC, DEVANAGARI = ("ARABIC",), ("DEVANAGARI",)
SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("zh", "yue"), HAN),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    **dict.fromkeys(("en", "es", "fr", "de", "it", "pt", "nl", "pl", "tr", "vi", "id"), LATIN),
    **dict.fromkeys(("ru", "uk", "bg"), CYRILLIC),
    **dict.fromkeys(("ar", "fa", "ur"), ARABIC),
    **dict.fromkeys(("hi", "mr", "ne"), DEVANAGARI),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "th": ("THAI",),
    "ta": ("TAMIL",),
    "bn": ("BENGALI",),
    "ka": ("GEORGIAN",),
    "hy": ("ARMENIAN",),
}
"""Scripts of languages, as the names of their letters in Unicode begin."""


def shared(one: str, other: str) -> tuple[str, ...]:
    """Return the scripts that two languages have in common."""
    return tuple(script for script in SCRIPTS[one] if script in SCRIPTS[other])
