"""Texts of strangers on the page."""

import html


def readable(text: str) -> str:
    """A text that can be sent: half of a surrogate pair, which JSON may hold and UTF-8 may not, becomes ``?``."""
    return text.encode(errors="replace").decode()


def escape(text: str) -> str:
    """A text as HTML shows it; whatever the page shows and did not make itself goes through here."""
    return html.escape(readable(text))
