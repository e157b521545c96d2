"""A section given by one word: `precision: nvfp4` stands for its keys."""

from nemotron.recipe.read import Document


def expand_precision(document: Document) -> None:
    """Replace `precision: NAME` by the preset of that name in bfloat16, or by plain `fp32`."""
    name = document.values.get("precision")
    if not isinstance(name, str) or "$" in name:
        return
    is_plain = name == "fp32"
    keys = {"compute": "fp32" if is_plain else "bf16", "preset": "bf16" if is_plain else name}
    document.values["precision"] = keys
    place = document.places[("precision",)]
    document.places |= {("precision", key): place for key in keys}
