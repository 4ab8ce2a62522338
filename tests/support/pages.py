"""The pages of the docs, as written."""

from __future__ import annotations

import re
from pathlib import Path

import docs

PAGES: list[Path] = docs.pages()
WRITTEN: list[Path] = docs.written()
TEXTS = {page: page.read_text(encoding="utf-8") for page in WRITTEN}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
