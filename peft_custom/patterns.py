"""Regular expressions for module names, matched in bounded time.

A configuration's patterns may be a stranger's, and Python's `re` goes back so often on some
("([a-z]+)+!") that it never ends. Here all ways to match are followed at once: the places of a name
that a part of the pattern can end at are the bits of one integer, so that nothing is tried twice.
"""

from __future__ import annotations

import functools
import re
from typing import Any

try:
    from re import _parser as parser  # where Python keeps the parser of `re` since 3.11
except ImportError:
    import sre_parse as parser  # type: ignore[no-redef]

MOST_STEPS = 50_000  # for one name; patterns that people write take some hundreds
_PLAIN = re.compile(r"(\w|-|\\?\.)*")  # no repeats and no choices: `re` cannot go back in it
_CATEGORIES = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}
_WORD = re.compile(r"\w")


def check_pattern(option: str, pattern: object) -> None:
    """Raises a ValueError that names the option where this is no usable regular expression."""
    try:
        matches(str(pattern), "")
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the whole of `name`, as `re.fullmatch` says.

    Raises:
        ValueError: it is no regular expression, it refers back to a group, or it takes too long.
    """
    if _PLAIN.fullmatch(pattern):
        return re.fullmatch(pattern, name) is not None
    try:
        return _Match(name).whole(_parsed(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{_short(pattern)} is not a regular expression ({error})") from error
    except ValueError as error:
        raise ValueError(f"{_short(pattern)} {error}") from None


def matches_end(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the whole of `name`, or its end from a dot on."""
    whole = rf"(.*\.)?({pattern})"
    if _PLAIN.fullmatch(pattern):
        return re.fullmatch(whole, name) is not None
    return matches(whole, name)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) < 80 else f"{pattern[:76]}…")


@functools.lru_cache(maxsize=1024)
def _parsed(pattern: str) -> Any:
    return parser.parse(pattern)


class _Match:
    """One name: how sets of places (bit i: before character i) move through a pattern's parts."""

    def __init__(self, name: str) -> None:
        self.name, self.steps = name, 0
        self.all = (1 << (len(name) + 1)) - 1
        self.known: dict[
            tuple[str, int], int
        ] = {}  # a one-character part -> the places of what it takes
        self.where: dict[str, int] = {}  # character -> its places
        for i, character in enumerate(name):
            self.where[character] = self.where.get(character, 0) | 1 << i

    def whole(self, tree: Any) -> bool:
        self.ignore_case = bool(tree.state.flags & re.IGNORECASE)
        return bool(self.through(tree, 1) >> len(self.name) & 1)

    def through(self, parts: Any, places: int) -> int:
        """Where a sequence of parts can end that starts at one of `places`."""
        for code, value in parts:
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise ValueError("takes too long to match: write it without nested repeats")
            if not places:
                return 0
            places = self.part(str(code), value, places)
        return places

    def part(self, code: str, value: Any, places: int) -> int:
        if code in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return (places & self.characters(code, value)) << 1
        if code == "SUBPATTERN":
            if value[1] or value[2]:
                raise ValueError("sets flags inside: write (?i) at its start")
            return self.through(value[-1], places)
        if code == "BRANCH":
            return functools.reduce(
                lambda found, branch: found | self.through(branch, places), value[1], 0
            )
        if code in ("MAX_REPEAT", "MIN_REPEAT"):
            return self.repeat(*value, places)
        if code in ("ASSERT", "ASSERT_NOT"):
            there = self.looking(*value)
            return places & (there if code == "ASSERT" else ~there)
        if code == "AT":
            return places & self.boundaries(str(value))
        raise ValueError("refers back to a group or is possessive, which module names do not need")

    def repeat(self, least: int, most: int, item: Any, places: int) -> int:
        # after as many rounds as there are places, another one finds nothing new
        for _ in range(min(least, len(self.name) + 1)):
            places = self.through(item, places)
        found = fresh = places
        for _ in range(min(most - least, len(self.name) + 1)):
            fresh = self.through(item, fresh) & ~found
            if not fresh:
                break
            found |= fresh
        return found

    def looking(self, direction: int, item: Any) -> int:
        """The places where a look ahead (direction 1) or behind (-1) finds `item`."""
        ends = [self.through(item, 1 << i) for i in range(len(self.name) + 1)]
        if direction < 0:
            return functools.reduce(int.__or__, ends)
        return sum(1 << i for i, end in enumerate(ends) if end)

    def characters(self, code: str, value: Any) -> int:
        """The places of the characters that a one-character part takes."""
        if code == "LITERAL" and not self.ignore_case:
            return self.where.get(chr(value), 0)
        if code == "ANY":
            return self.all
        key = (code, id(value))
        if key not in self.known:
            self.known[key] = sum(at for c, at in self.where.items() if self.takes(code, value, c))
        return self.known[key]

    def takes(self, code: str, value: Any, character: str) -> bool:
        both = (character.lower(), character.upper())
        forms = {character, *both} if self.ignore_case else {character}
        if code == "LITERAL":
            return chr(value) in forms
        if code == "NOT_LITERAL":
            return chr(value) not in forms
        negated = str(value[0][0]) == "NEGATE"
        return negated != any(_in_set(str(kind), one, f) for kind, one in value for f in forms)

    def boundaries(self, kind: str) -> int:
        n = len(self.name)
        if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return 1
        if kind in ("AT_END", "AT_END_STRING"):
            return 1 << n
        word = [bool(_WORD.match(c)) for c in self.name]
        sides = zip([False, *word], [*word, False], strict=True)
        edges = sum(1 << i for i, (before, after) in enumerate(sides) if before != after)
        return edges if "NON" not in kind else self.all & ~edges


def _in_set(kind: str, value: Any, character: str) -> bool:
    if kind == "LITERAL":
        return ord(character) == value if len(character) == 1 else False
    if kind == "RANGE":
        return len(character) == 1 and value[0] <= ord(character) <= value[1]
    if kind == "CATEGORY":
        _, _, name = str(value).partition("CATEGORY_")
        inside = re.match(_CATEGORIES[name.removeprefix("NOT_")], character) is not None
        return inside != name.startswith("NOT_")
    return False  # NEGATE
