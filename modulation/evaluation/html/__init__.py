"""The HTML report in parts: a page, drawings as inline SVG, and one file a section."""
