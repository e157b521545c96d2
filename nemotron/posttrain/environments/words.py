"""Names and words from which tasks are composed."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    """Ada Ben Clara David Emma Felix Greta Hugo Ines Jonas Karla Leo Mia Nils Olga Paul Rosa Sven
    Tara Uwe Vera Walter Yara Zoe"""
)
LAST_NAMES = _words(
    """Adler Brandt Costa Dahl Ernst Fischer Gruber Hansen Ivanov Jensen Keller Lindt Moreau Novak
    Olsen Petrov Rossi Silva Tanaka Ulrich Vogel Weber Young Zimmer"""
)
CITIES = _words(
    """Athens Berlin Cairo Dublin Geneva Hanoi Istanbul Jakarta Kyoto Lisbon Madrid Nairobi Oslo
    Prague Quito Rome Seoul Tunis Utrecht Vienna Warsaw Zurich"""
)
ITEMS = _words(
    """apple basket candle drum envelope flute glove hammer ink jacket kettle lamp mirror needle
    orange pencil quilt ribbon spoon teapot umbrella violin wallet yarn"""
)
NOUNS = _words(
    """anchor autumn bridge butter camera canyon carpet castle cherry circle copper corner desert
    dinner dragon engine falcon feather forest garden ginger guitar harbor hunter island jungle
    kitchen ladder lantern leather lizard magnet marble meadow mountain mustard ocean orchard
    oyster palace paper parrot pepper pillow pirate planet pocket prairie puzzle rabbit river
    rocket saddle sailor salmon scarf shadow silver spider summer temple thunder timber tunnel
    turtle valley velvet village walnut whisper window winter wizard yellow zebra"""
)
