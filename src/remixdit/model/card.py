"""What the cards of models say of their licences."""

import json

__all__ = ["license_lines"]

# Identifiers of the Hugging Face Hub; every other licence is "other", with a name.
HUB_LICENSES = {
    *("afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m"),
    *("bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause"),
    *("bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0"),
    *("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0"),
    *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc0-1.0", "creativeml-openrail-m", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1"),
    *("lgpl-3.0", "mit", "mpl-2.0", "openrail", "openrail++", "unlicense", "wtfpl", "zlib"),
}


def license_lines(name: str) -> str:
    """Return the lines of a card's front matter that state a licence, "" for none."""
    if not name:
        return ""
    if name.lower() in HUB_LICENSES:
        return f"license: {name.lower()}\n"
    # A JSON string is a YAML string, and cannot add lines of its own.
    return f"license: other\nlicense_name: {json.dumps(name)}\n"
