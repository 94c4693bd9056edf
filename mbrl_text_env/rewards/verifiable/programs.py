"""The program in a response."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# What may stand before a fence: white space, marks of quotes, and those of an item of a list.
_FENCE = re.compile(r"((?:[ \t]|>|[-*+][ \t]|\d{1,9}[.)][ \t])*)(`{3,}|~{3,})(.*)", re.DOTALL)
_QUOTES = re.compile(r"[ \t]*+>[ \t]?")
_PYTHON = ("python", "python3", "py", "{.python}")


@dataclass
class _Block:
    language: str
    fence: str
    quotes: int
    lines: list[str] = field(default_factory=list)

    def line(self, line: str) -> str:
        """A line without the marks of the quote that the block stands in."""
        # One match, however many quotes are in each other: a response can have thousands.
        start = 0
        for _, mark in zip(range(self.quotes), _QUOTES.finditer(line), strict=False):
            if mark.start() != start:
                break
            start = mark.end()
        return line[start:]

    def code(self) -> str:
        """The lines, less what the first one is indented by: no program begins so."""
        first = next((line for line in self.lines if line.strip()), "")
        indent = first[: len(first) - len(first.lstrip(" \t"))]
        return "".join(line.removeprefix(indent) for line in self.lines)


def extract_code(response: str, marks: str = "") -> str:
    """The program in a response.

    It is the last fenced block marked as Python, else the last fenced block, else the whole
    response. A block that is not closed goes to the end. A block may be indented, quoted, or belong
    to an item of a list.

    Args:
        response: The response.
        marks: A pattern (with `^` for the start of a line) of what the program has to have; if it
            is found in one of several blocks, the last of those is the program. So an example of
            its use, which often comes after the program, is not taken for it.

    Example:
        >>> extract_code("Thus:\\n```python\\nprint(1)\\n```\\nIt prints 1.")
        'print(1)\\n'
        >>> extract_code("> ```python\\n> print(1)\\n> ```")
        'print(1)\\n'
        >>> extract_code("print(2)")
        'print(2)'
    """
    blocks: list[_Block] = []
    is_open = False
    for line in response.removeprefix("\ufeff").splitlines(keepends=True):
        if is_open:
            text = blocks[-1].line(line)
            bare = text.strip()
            fence = blocks[-1].fence
            if bare.startswith(fence) and not bare.strip(fence[0]):
                is_open = False
            else:
                blocks[-1].lines.append(text)
        elif (match := _FENCE.match(line)) is not None:
            prefix, fence, language = match.groups()
            # A line such as ```x = 1``` is inline code, and no fence.
            if fence[0] not in language:
                is_open = True
                blocks.append(_Block(language.strip().lower(), fence, prefix.count(">")))
    python = [each for each in blocks if each.language.split(maxsplit=1)[:1] in _LANGUAGES]
    programs = [each.code() for each in python or blocks]
    fitting = [each for each in programs if marks and re.search(marks, each, re.MULTILINE)]
    return (fitting or programs or [response])[-1]


_LANGUAGES = [[each] for each in _PYTHON]
