"""Commands quoted for a shell, in one printable line, whatever names are in it."""

import shlex
from collections.abc import Sequence


def shell_words(words: Sequence[str]) -> str:
    r"""Returns words, quoted if a shell needs that; as `$'...'` of bash and zsh if they hold unprintable characters.

    >>> print(shell_words(["evaluate", "my model", "it's\n\u202e"]))
    evaluate 'my model' $'it\'s\x0a\u202e'
    """
    return " ".join(shlex.quote(word) if word.isprintable() else f"$'{_escaped(word)}'" for word in words)


def _escaped(word: str) -> str:
    return "".join("\\" + letter if letter in "\\'" else _printable(letter) for letter in word)


def _printable(letter: str) -> str:
    number = ord(letter)
    if letter.isprintable():
        return letter
    if number < 128 or 0xDC80 <= number <= 0xDCFF:  # the latter stand for bytes that are not UTF-8
        return f"\\x{number & 0xFF:02x}"
    return f"\\u{number:04x}" if number < 2**16 else f"\\U{number:08x}"
