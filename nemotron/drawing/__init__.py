"""Charts and heat maps as SVG."""
