"""The types of constraints: the description, the check, and the verdict on a prefix for each.

Most follow IFEval: Zhou et al., "Instruction-Following Evaluation for Large Language Models", 2023,
https://github.com/google-research/google-research (instruction_following_eval). Each docstring
lists the deviations. These hold for all types: words are counted in every script with spaces
between words, texts are compared in Unicode's composed form, curly apostrophes equal straight ones,
"less than n" is "at most" here, and rules replace IFEval's NLTK tokenizers.

The verdict on a prefix is sound: it holds for every continuation. None means that continuations can
differ, or that the rule cannot exclude it. For example, a combining accent can still change the
last letter of a word until an ASCII character follows.
"""

# ruff: noqa: RUF001 - commas and quotation marks of other scripts are intended.

from __future__ import annotations

import json
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, NewType, TypeVar, get_type_hints

from mbrl_text_env._lazy import optional
from mbrl_text_env.files import refuse_constant
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.verifiable.constraints.text import (
    bare_words,
    count_occurrences,
    count_sentences,
    is_of_marks,
    normal,
    settled_phrases,
    settled_text,
    settled_words,
    words_of,
)

Verdict = bool | None
Function = TypeVar("Function", bound=Callable[..., Any])

Letter = NewType("Letter", str)
LanguageCode = NewType("LanguageCode", str)
_CODES = (
    "af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml "
    "mr ne nl no pa pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw"
)
LANGUAGES = frozenset(_CODES.split())
"""The codes of the languages that langdetect supports (mostly ISO 639-1)."""


@dataclass(frozen=True)
class Kind:
    """A type of constraint; call it with a whole response and the arguments to check it.

    Args:
        description: The requirement, and the deviations from IFEval.
        decide: `decide(text, ended, **arguments)` returns whether the response satisfies the
            constraint, or None if that is still open. The text, which is not blank, is the whole
            response if `ended`, otherwise a prefix.
        arguments: The types of the arguments by name; `prompt` is the text of the prompt.
    """

    description: str
    decide: Callable[..., Verdict]
    arguments: Mapping[str, Any]

    def __call__(self, response: str, **arguments: Any) -> bool:
        """Return whether a whole response satisfies the constraint."""
        return bool(self.decide(response, True, **arguments))


@dataclass(frozen=True)
class Counted:
    """A count in a text; the `settled` part of a prefix has a count that can only increase.

    Args:
        count: `count(text, **arguments)`, an integer.
        argument: The name of its argument besides the text, or None.
    """

    count: Callable[..., int]
    settled: Callable[[str], str]
    argument: str | None


COUNTED: dict[str, Counted] = {}
"""The counts by name, such as "words"."""
RELATIONS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {}
"""For constraints on a count, the name of the count and its required relation to `value`."""
CONSTRAINT_TYPES: dict[str, Kind] = {}
"""All types by name. `check_constraint` also checks the arguments and blank responses."""


def _kind(decide: Function) -> Function:
    """Register a type of constraint with the name and docstring of its `decide` function."""
    _add(decide.__name__, decide.__doc__ or "", decide, get_type_hints(decide))
    return decide


def _add(name: str, description: str, decide: Callable[..., Verdict], hints: Any) -> None:
    arguments = {key: hints[key] for key in hints.keys() - {"text", "ended", "return"}}
    CONSTRAINT_TYPES[name] = Kind(description, decide, arguments)


def _stays(verdict: bool | None, settled: Callable[[str], str] = str) -> Any:
    """Register a type of constraint with a check of whole texts.

    `verdict` is True if a constraint stays satisfied once the `settled` part of a prefix satisfies
    it, False if it stays violated once that part violates it, and None if only the end decides.
    """

    def note(check: Function) -> Function:
        @wraps(check)
        def decide(text: str, ended: bool, **arguments: Any) -> Verdict:
            if ended:
                return bool(check(text, **arguments))
            is_decided = verdict is not None and check(settled(text), **arguments) is verdict
            return verdict if is_decided else None

        _kind(decide)
        return check

    return note


_RELATIONS = {"at_least": operator.ge, "at_most": operator.le, "exactly": operator.eq}


def _counted(settled: Callable[[str], str] = str, **names: str) -> Callable[[Function], Function]:
    """Register the types of constraint on a count; `names` maps relations to names.

    `settled` returns the part of a prefix whose count no continuation can lower.
    """

    def note(count: Function) -> Function:
        arguments = (key for key in get_type_hints(count) if key not in ("text", "return"))
        COUNTED[count.__name__] = Counted(count, settled, next(arguments, None))
        for relation, name in names.items():
            RELATIONS[name] = count.__name__, _RELATIONS[relation]
            decide = partial(_decide_count, count, settled, _RELATIONS[relation])
            description = f"{relation.replace('_', ' ').capitalize()} `value` {count.__doc__}"
            _add(name, description, decide, {**get_type_hints(count), "value": int})
        return count

    return note


def _decide_count(
    count: Any, settled: Any, holds: Any, text: str, ended: bool, *, value: int, **arguments: Any
) -> Verdict:
    if ended:
        return bool(holds(count(text, **arguments), value))
    found = count(settled(text), **arguments)
    if holds is operator.ge:
        return True if found >= value else None
    return False if found > value else None


# --- Counts ---


@_counted(at_least="min_words", at_most="max_words")
def words(text: str) -> int:
    """words, which are separated by white space and contain a letter or a digit.

    A Chinese, Japanese or Thai text without spaces is one word. In IFEval's `number_words`, "don't"
    is two words.
    """
    return sum(any(map(str.isalnum, word)) for word in text.split())


# Until a space follows, "2" can become a list number and "p.s" an abbreviation. Whether "U.S."
# ends a sentence depends only on the next word.
@_counted(settled_words, at_least="min_sentences", at_most="max_sentences", exactly="num_sentences")
def sentences(text: str) -> int:
    """sentences.

    A sentence ends at a full stop, question mark, exclamation mark or ellipsis before white space,
    at the full stops of other scripts (Chinese, Japanese, Hindi, Arabic, Urdu and more), at a blank
    line and at the end. List numbers, English titles such as "Dr." and marks without words do not
    count. Initials ("J. K. Rowling") and abbreviations ("U.S.", "Ph.D.", "Inc.") end a sentence
    before a word that usually starts one, such as "The"; "p.m." and "etc." before a capital letter.
    Quoted speech with its own mark ('"Stop!" she said.') ends a sentence. IFEval uses NLTK's punkt.
    """
    return count_sentences(text)


_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


@_counted(at_least="min_paragraphs", at_most="max_paragraphs", exactly="num_paragraphs")
def paragraphs(text: str) -> int:
    """paragraphs, separated by one or more blank lines (in IFEval, by "***")."""
    return len(_PARAGRAPH_BREAK.split(text.strip()))


# A mark with text after it; a line of three or more marks is a horizontal rule.
_BULLET = re.compile(r"^[ \t]*(?!([-*])(?:[ \t]*\1){2,}[ \t\r]*$)[-*][ \t]+\S", re.MULTILINE)
_OPEN_RULE = re.compile(r"(?:^|\n)[ \t]*([-*])(?:[ \t]*\1)*[ \t\r]*\Z")


@_counted(partial(_OPEN_RULE.sub, ""), exactly="num_bullets")
def bullets(text: str) -> int:
    """lines that start with "-" or "*", white space and text.

    Indentation is ignored. A horizontal rule, such as "* * *", is not a bullet. IFEval's
    `number_bullet_lists` does not require a space after the mark.
    """
    return sum(1 for _ in _BULLET.finditer(text))


@_counted(
    settled_phrases,
    at_least="keyword_count",
    at_most="max_keyword_count",
    exactly="exact_keyword_count",
)
def occurrences(text: str, keyword: str) -> int:
    """occurrences of `keyword` as whole words (IFEval: also in longer words); see `keywords`."""
    return count_occurrences(keyword, text)


@_counted(settled_text, at_least="min_letter_count", at_most="max_letter_count")
def letters(text: str, letter: Letter) -> int:
    """occurrences of `letter`, ignoring case, as in IFEval; it can also be a digit or a mark."""
    text, form = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", letter)
    return sum(map(text.count, {form, form.lower(), form.upper()}))


@_counted(settled_words, at_least="min_capital_words", at_most="max_capital_words")
def capital_words(text: str) -> int:
    """words in capitals, ignoring marks and digits: "NO" and "I", but not "B-52s".

    IFEval's `capital_word_frequency` first separates words with NLTK, as in "HE'll".
    """
    return sum(map(str.isupper, text.split()))


@_counted(at_least="placeholders")
def placeholders(text: str) -> int:
    """[bracketed] placeholders that are not blank (in IFEval, they can be); repetitions count."""
    return sum(bool(inside.strip()) for inside in re.findall(r"\[([^\[\]\n]+)\]", text))


@_counted(at_least="highlights")
def highlights(text: str) -> int:
    """*highlighted* or **highlighted** parts of lines.

    As in Markdown, there must be no spaces inside the marks: "2 * 3 * 4" has no highlight. In
    IFEval it has one.
    """
    return len(re.findall(r"\*\*(?=\S)[^*\n]+(?<=\S)\*\*|\*(?=\S)[^*\n]+(?<=\S)\*", text))


@_counted(at_least="sections")
def sections(text: str, splitter: str) -> int:
    """occurrences of `splitter` (case-sensitive, not ending a longer word) before a number."""
    return len(re.findall(rf"(?<![^\W_]){re.escape(splitter.strip())}\s?\d+", text))


# --- Required and forbidden content ---


@_stays(True, settled_phrases)
def keywords(text: str, value: list[str]) -> bool:
    """Every word or phrase of `value` occurs as whole words, ignoring case.

    Markdown marks around a word (`**river**`, `_river_`) are ignored. In scripts without spaces
    between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), a phrase also matches inside
    longer words. A Korean phrase also matches before particles. IFEval's `existence` matches all
    phrases inside other words.
    """
    return all(count_occurrences(word, text) for word in value)


@_stays(False, settled_phrases)
def forbidden_words(text: str, value: list[str]) -> bool:
    """No word or phrase of `value` occurs as whole words, ignoring case; see `keywords`."""
    return not any(count_occurrences(word, text) for word in value)


@_stays(False)
def no_commas(text: str) -> bool:
    """There is no comma, Arabic, Chinese and Japanese ones included (IFEval allows these)."""
    return set(",，、،").isdisjoint(text)


# With a small letter before it, a prefix is lowercase unless it has a capital letter.
@_stays(False, "a{}".format)
def lowercase(text: str) -> bool:
    """There is at least one letter with a case, and all such letters are lowercase.

    IFEval's `english_lowercase` also requires English; add `language` for that.
    """
    return text.islower()


@_stays(False, "A{}".format)
def uppercase(text: str) -> bool:
    """There is at least one letter with a case, and all are uppercase; see `lowercase`."""
    return text.isupper()


@_stays(True)
def title(text: str) -> bool:
    """There is a title in <<double angle brackets>>, on one line and not blank, as in IFEval."""
    titles = re.findall(r"<<((?:(?!<<|>>)[^\n])+)>>", text)
    return any(each.strip("<> \t") for each in titles)


@_stays(True)
def postscript(text: str) -> bool:
    """A line starts with "P.S.", optionally after marks such as `**` (IFEval: anywhere in it)."""
    return re.search(r"^[ \t>#*_]*P\.S\.", text, re.MULTILINE) is not None


# --- Start and end ---


@_kind
def starts_with(text: str, ended: bool, value: str) -> Verdict:
    """The text starts with `value` (case-sensitive), after white space; not in IFEval."""
    # Append a character to a prefix, to keep the white space at its end.
    begun = normal(text) if ended else normal(f"{settled_text(text)}.")[:-1]
    wanted = normal(value)
    if begun.startswith(wanted):
        return True
    return None if wanted.startswith(begun) and not ended else False


@_stays(None)
def ends_with(text: str, value: str) -> bool:
    """The text ends with `value` (case-sensitive), before white space.

    IFEval's `end_checker` ignores case and quotation marks around the response.
    """
    return normal(text).endswith(normal(value))


@_kind
def quoted(text: str, ended: bool) -> Verdict:
    """The first and last characters are double quotation marks, straight or curly, around text.

    More quotation marks between them are allowed, for speech. IFEval accepts only straight ones.
    """
    text = text.strip()
    closing = {'"': '"', "“": "”"}.get(text[0])
    if not ended and closing:
        return None
    return bool(text[1:-1].strip()) and text[-1] == closing


@_kind
def repeats_prompt(text: str, ended: bool, prompt: str) -> Verdict:
    """The response starts with the words of the prompt, ignoring case, and continues after them.

    For a chat, the last user message counts. IFEval's `repeat_prompt` repeats an argument (here,
    `starts_with`), and requires nothing after it.
    """
    asked, given = words_of(prompt), words_of(text if ended else settled_words(text))
    if given[: len(asked)] != asked[: len(given)]:
        return False
    # For a prefix, a word has started after the last required one.
    goes_on = len(given) >= len(asked) and len(text.split()) > len(asked)
    return True if goes_on else False if ended else None


@_kind
def paragraph_first_word(text: str, ended: bool, index: int, value: str) -> Verdict:
    """Paragraph `index`, counted from 1, starts with the word `value`, ignoring case.

    Marks around the word, and bullets, headings and dashes before it, are ignored. IFEval's
    `nth_paragraph_first_word` also requires a number of paragraphs; add `num_paragraphs` for that.
    """
    found = _PARAGRAPH_BREAK.split(text.strip() if ended else text.lstrip())
    if index > len(found):
        return False if ended else None
    begun, is_whole = found[index - 1], ended or index < len(found)
    if not is_whole:
        begun = settled_words(begun)
        if is_of_marks(begun):
            return None
    return bare_words(begun)[:1] == bare_words(value)[:1]


# --- The whole response ---


@_kind
def json_object(text: str, ended: bool) -> Verdict:
    """The whole response is a JSON object, without a code fence or other text around it.

    IFEval's `json_format` accepts any JSON value, also in a code fence.
    """
    decoder, space = json.JSONDecoder(parse_constant=refuse_constant), " \t\n\r"
    text = text.lstrip(space)
    if text and not text.startswith("{"):
        return False
    try:
        _, end = decoder.raw_decode(text)
    except (ValueError, RecursionError):
        # Small models often write thousands of opening brackets, which raise RecursionError.
        return False if ended else None
    return False if text[end:].strip(space) else ended or None


@_kind
def numbered_list(text: str, ended: bool, value: int) -> Verdict:
    """The numbered lines ("1. ", "2) ") count from 1 to `value`, in order; not in IFEval."""
    # Longer numbers are not list numbers.
    found = re.findall(r"^[ \t]*(\d{1,9})[.)][ \t]+\S", text, re.MULTILINE)
    numbers, wanted = list(map(int, found)), list(range(1, value + 1))
    if ended:
        return numbers == wanted
    return None if numbers == wanted[: len(numbers)] else False


@_kind
def two_responses(text: str, ended: bool) -> Verdict:
    """There are two different texts, separated (optionally surrounded) by ******, as in IFEval."""
    parts = [part.strip() for part in text.split("******")]
    if ended:
        texts = list(filter(None, parts))
        return len(texts) == 2 and texts[0] != texts[1] and all(parts[1:-1])
    # Marks at the end can become the next separator.
    last, texts = parts.pop().rstrip("*").strip(), list(filter(None, parts))
    is_same = len(texts) == 2 and texts[0] == texts[1]
    return False if not all(parts[1:]) or len(texts) + bool(last) > 2 or is_same else None


@_kind
def one_of(text: str, ended: bool, value: list[str]) -> Verdict:
    """The whole response is one of the options, ignoring case and marks.

    An option that consists of marks must match exactly. IFEval's `constrained_response` requires
    only that the response contains an option, so a response with several options passes.
    """
    options = list(map(bare_words, value))
    if ended:
        return bare_words(text) in options
    begun = settled_words(text)
    if is_of_marks(begun):
        return None
    words = bare_words(begun)
    return None if any(option[: len(words)] == words for option in options) else False


@_stays(None)
def language(text: str, value: LanguageCode) -> bool:
    """The most likely language is `value` according to langdetect with a fixed random seed.

    langdetect is often wrong for fewer than about five words, so also require a minimum number of
    words. A response without letters (digits, marks) fails; it passes IFEval's `response_language`,
    which also uses new random numbers in each call. `RewardError` if the extra `verify` is not
    installed.
    """
    detectors = _detectors()
    from langdetect.lang_detect_exception import LangDetectException

    detector = detectors.create()
    detector.append(text)
    try:
        return bool(detector.detect() == value)
    except LangDetectException:
        return False


@lru_cache(maxsize=1)
def _detectors() -> Any:
    # A separate factory, because all users of the package share the default one and its seed.
    module = optional("langdetect.detector_factory", RewardError)
    factory = module.DetectorFactory()
    factory.load_profile(module.PROFILES_DIRECTORY)
    factory.set_seed(0)
    return factory
