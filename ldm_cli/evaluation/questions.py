"""Questions with an answer turned into statements, as captions make them: a CLIP compares pictures with those.

Rules for English questions, the first that fits; others become `QUESTION ANSWER`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_YES, _NO = ("yes", "true"), ("no", "false")
_ONE = ("one", "1", "a", "an", "a single")
# Words that name no thing, beside the answer that does.
_ANYTHING = r"(?:objects?|things?|shapes?|figures?|items?|pictures?|images?|ones?)"
_DETERMINER = re.compile(
    r"(?:a|an|the|this|that|these|those|some|my|its|no|one|two|three|four|five|\d+)\s", re.IGNORECASE
)
_PREPOSITION = re.compile(r"(?:at|in|on|under|above|below|behind|near|next|inside|outside|over|between|to|by)\s")
_HERE = re.compile(r"\s*\b(?:(?:there )?in (?:this|the) (?:picture|image|photo|scene)|there|here)$")
_IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "feet": "foot"}


def statement(question: str, answer: str) -> str:
    """What a caption would say if the answer were right.

    >>> statement("What colour is the circle?", "red"), statement("Where is the red circle?", "top left")
    ('a red circle', 'a red circle at the top left')
    >>> statement("How many dogs are there?", "one"), statement("Is there a cat?", "no")
    ('one dog', 'no cat')

    Args:
        question: with or without its mark; capitals do not count.
        answer: one of those that are offered.
    """
    asked, answer = " ".join(question.rstrip("?. ").lower().split()), answer.strip()
    for pattern, say in _RULES:
        if found := re.fullmatch(pattern, asked):
            said = say(answer, *(part or "" for part in found.groups()))
            if said is not None:
                return " ".join(said.split())
    return f"{' '.join(question.split())} {answer}"


def _with_article(words: str) -> str:
    """`red circle` → `a red circle`; words with a determiner stay."""
    if _DETERMINER.match(words + " "):
        return words
    return f"an {words}" if words[:1].lower() in set("aeiou") else f"a {words}"


def _thing(words: str) -> str:
    """`the red circle` → `red circle`."""
    return re.sub(r"^(?:a|an|the|this|that|these|those|any|some)\s", "", words)


def _attribute(answer: str, attribute: str, thing: str) -> str:
    """Before the thing: `a red circle on the left`; a shape in place of it where that is only `the object`."""
    words = re.sub(r"^(?:it|this|that)\b", "object", _thing(_HERE.sub("", thing)))
    said, count = re.subn(rf"\b{_ANYTHING}\b", answer, words, count=1)
    return _with_article(said if count and attribute == "shape" else f"{answer} {words}")


def _number(answer: str, things: str) -> str:
    """`two circles`, `one circle`, `no circle`."""
    things = _HERE.sub("", re.sub(r"\s(?:are|is|do|can)\b(?: (?:there|you see))?", "", things)).strip()
    if answer.lower() not in _ONE:
        return f"{answer} {things}"
    head, *rest = things.split(" in ", 1)
    *words, noun = head.split()
    noun = _IRREGULAR.get(noun) or re.sub(r"(?<=ss|sh|ch|.x)es$|(?<!s)s$", "", re.sub(r"ies$", "ys", noun))
    return " ".join([answer, *words, noun, *(f"in {place}" for place in rest)])


def _place(answer: str, thing: str) -> str:
    """The thing, and the answer as a place: `at the top left`, `on the left`, `in the kitchen`."""
    bare = re.sub(r"^the\s", "", answer)
    if _PREPOSITION.match(answer):
        where = answer
    elif bare in ("left", "right"):
        where = f"on the {bare}"
    else:
        where = f"{'at' if bare.startswith(('top', 'bottom')) else 'in'} the {bare}"
    return f"{_with_article(_thing(_HERE.sub('', thing)))} {where}"


def _there_is(answer: str, thing: str) -> str | None:
    """The thing, or none of it; None for an answer that is neither yes nor no."""
    bare = re.sub(r"^(?:any|some)\s", "", _HERE.sub("", thing))
    if answer.lower() in _YES:
        return bare
    return f"no {_thing(bare)}" if answer.lower() in _NO else None


def _is_it(answer: str, verb: str, thing: str, rest: str) -> str | None:
    """`the circle is red`, `the circle is not red`; `a circle`, `not a circle` where only `it` is asked about."""
    if answer.lower() not in (*_YES, *_NO):
        return None
    negation = "not " if answer.lower() in _NO else ""
    return f"{negation}{rest}" if thing in ("it", "this", "that") else f"{thing} {verb} {negation}{rest}"


_PICTURE = r"(?:this|that|it|the (?:picture|image|photo)|this (?:picture|image|photo))"
_RULES: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (rf"what(?:'s| is| are) (?:{_PICTURE}|(?:shown |there )?in {_PICTURE})", _with_article),
    (rf"what (?:do you see|can you see|does {_PICTURE} show)(?: .*)?", _with_article),
    (r"(?:what|which) (colou?r|shape|size|material|texture) (?:is|are|has) (.+)", _attribute),
    (r"what is the (colou?r|shape|size|material|texture) of (.+)", _attribute),
    (
        rf"(?:what|which) (?:(?:kind|type|sort) of )?\w+ (?:is|are) (?:{_PICTURE}|(?:there )?in {_PICTURE})",
        _with_article,
    ),
    (r"how many (.+)", _number),
    (r"where (?:is|are) (.+)", _place),
    (r"(?:is|are) there (.+)", _there_is),
    (r"(is|are) (it|(?:this|that)(?= an? | the )|(?:the|this|that|these|those) \w+) (.+)", _is_it),
    (r"which (\w+) (is|are|has|have) (.+)", lambda answer, noun, verb, rest: f"the {answer} {noun} {verb} {rest}"),
    (r"what (is|are) (.+) doing", lambda answer, verb, thing: f"{thing} {verb} {answer}"),
    (r"what (is|are) (.+) (\w+ing)", lambda answer, verb, thing, deed: f"{thing} {verb} {deed} {answer}"),
    (r"what (is|are) (.+)", lambda answer, verb, thing: f"{thing} {verb} {answer}"),
)
