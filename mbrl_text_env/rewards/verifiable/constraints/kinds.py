"""The types of constraints: of each its description, its check, and what a prefix decides of it.

Most follow IFEval: Zhou et al., "Instruction-Following Evaluation for Large Language Models", 2023,
https://github.com/google-research/google-research (instruction_following_eval). Each docstring says
how it deviates. Common to all: words are counted in any script that puts spaces between them, texts
are compared in Unicode's composed form, curly apostrophes are straight ones, "less than n" is "at
most" here, and what needs a tokenizer of NLTK there is done by rules.

What a prefix decides is sound: every continuation comes out so. None means that continuations
differ, or that the rule does not see that they do not, as of words whose last letters a combining
accent could still change, where nothing of ASCII follows.
"""

# ruff: noqa: RUF001 - the commas and quotation marks of other scripts are meant.

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
"""The languages that langdetect knows, by their codes (mostly of ISO 639-1)."""


@dataclass(frozen=True)
class Kind:
    """A type of constraint; called with a whole response and the arguments, it checks.

    Args:
        description: What it asks for, and how it deviates from IFEval.
        decide: `decide(text, ended, **arguments)`: whether the response, which is the text if that
            has ended and else begins with it, satisfies it; None if that is open. The text is not
            blank.
        arguments: The types of the arguments by their names; `prompt` is the text of the prompt.
    """

    description: str
    decide: Callable[..., Verdict]
    arguments: Mapping[str, Any]

    def __call__(self, response: str, **arguments: Any) -> bool:
        """Whether a whole response satisfies it."""
        return bool(self.decide(response, True, **arguments))


@dataclass(frozen=True)
class Counted:
    """What can be counted in a text; nothing after the `settled` part of a prefix lowers its count.

    Args:
        count: `count(text, **arguments)`, an integer.
        argument: The name of its argument beside the text; None where it has none.
    """

    count: Callable[..., int]
    settled: Callable[[str], str]
    argument: str | None


COUNTED: dict[str, Counted] = {}
"""What constraints count, by its name, such as "words"."""
RELATIONS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {}
"""Of constraints on a count: what is counted, and how it has to be related to `value`."""
CONSTRAINT_TYPES: dict[str, Kind] = {}
"""Every type by its name. `check_constraint` also checks the arguments, and blank responses."""


def _kind(decide: Function) -> Function:
    """A type of constraint with the name and docstring of the function that decides it."""
    _add(decide.__name__, decide.__doc__ or "", decide, get_type_hints(decide))
    return decide


def _add(name: str, description: str, decide: Callable[..., Verdict], hints: Any) -> None:
    arguments = {key: hints[key] for key in hints.keys() - {"text", "ended", "return"}}
    CONSTRAINT_TYPES[name] = Kind(description, decide, arguments)


def _stays(verdict: bool | None, settled: Callable[[str], str] = str) -> Any:
    """A type of constraint with a check of whole texts.

    `verdict` is True if what the `settled` part of a prefix satisfies stays satisfied, False if
    what it breaks stays broken, None if nothing is decided before the end.
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
    """Types of constraint of a function that counts something, their names by their relations.

    `settled` is the part of a prefix whose count nothing after it lowers.
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


# --- What is counted ---


@_counted(at_least="min_words", at_most="max_words")
def words(text: str) -> int:
    """words: runs without white space that have a letter or a digit in them.

    A Chinese, Japanese or Thai text without spaces is one word. In IFEval's `number_words` "don't"
    is two.
    """
    return sum(any(map(str.isalnum, word)) for word in text.split())


# "2" may become the number of a list, and "p.s" an abbreviation, while no space follows; and
# whether "U.S." ends a sentence depends on the next word alone.
@_counted(settled_words, at_least="min_sentences", at_most="max_sentences", exactly="num_sentences")
def sentences(text: str) -> int:
    """sentences.

    They end at a full stop, question mark, exclamation mark or ellipsis with white space after it,
    at the full stops of other scripts (Chinese, Japanese, Hindi, Arabic, Urdu and more), at a blank
    line and at the end. Numbers of a list, English titles such as "Dr." and marks without words do
    not count. Initials ("J. K. Rowling") and abbreviations ("U.S.", "Ph.D.", "Inc.") end one where
    a word follows that usually begins one, such as "The"; "p.m." and "etc." where a capital letter
    does. Speech that ends in a mark of its own ('"Stop!" she said.') ends one. IFEval asks punkt.
    """
    return count_sentences(text)


_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


@_counted(at_least="min_paragraphs", at_most="max_paragraphs", exactly="num_paragraphs")
def paragraphs(text: str) -> int:
    """paragraphs, separated by one or more blank lines; in IFEval by "***"."""
    return len(_PARAGRAPH_BREAK.split(text.strip()))


# A mark and text after it; a line of three marks or more is a rule across the page.
_BULLET = re.compile(r"^[ \t]*(?!([-*])(?:[ \t]*\1){2,}[ \t\r]*$)[-*][ \t]+\S", re.MULTILINE)
_OPEN_RULE = re.compile(r"(?:^|\n)[ \t]*([-*])(?:[ \t]*\1)*[ \t\r]*\Z")


@_counted(partial(_OPEN_RULE.sub, ""), exactly="num_bullets")
def bullets(text: str) -> int:
    """lines that start with "-" or "*" and white space, and go on.

    Indentation is ignored. A rule across the page, such as "* * *", is none. IFEval's
    `number_bullet_lists` asks for no space after the mark.
    """
    return sum(1 for _ in _BULLET.finditer(text))


@_counted(
    settled_phrases,
    at_least="keyword_count",
    at_most="max_keyword_count",
    exactly="exact_keyword_count",
)
def occurrences(text: str, keyword: str) -> int:
    """occurrences of `keyword` as whole words, in any case (IFEval: in others); see `keywords`."""
    return count_occurrences(keyword, text)


@_counted(settled_text, at_least="min_letter_count", at_most="max_letter_count")
def letters(text: str, letter: Letter) -> int:
    """occurrences of `letter`, small or capital, as in IFEval; it may be a digit or a mark."""
    text, form = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", letter)
    return sum(map(text.count, {form, form.lower(), form.upper()}))


@_counted(settled_words, at_least="min_capital_words", at_most="max_capital_words")
def capital_words(text: str) -> int:
    """words in capitals, marks and digits aside: "NO", "I", "B-52s" not.

    IFEval's `capital_word_frequency` has NLTK separate words from marks first, as in "HE'll".
    """
    return sum(map(str.isupper, text.split()))


@_counted(at_least="placeholders")
def placeholders(text: str) -> int:
    """[bracketed] placeholders, not blank (in IFEval they may be); repeated ones count each."""
    return sum(bool(inside.strip()) for inside in re.findall(r"\[([^\[\]\n]+)\]", text))


@_counted(at_least="highlights")
def highlights(text: str) -> int:
    """*highlighted* or **highlighted** parts of lines.

    Spaces inside the marks at either end make none, as in Markdown: "2 * 3 * 4" has none. In IFEval
    it has one.
    """
    return len(re.findall(r"\*\*(?=\S)[^*\n]+(?<=\S)\*\*|\*(?=\S)[^*\n]+(?<=\S)\*", text))


@_counted(at_least="sections")
def sections(text: str, splitter: str) -> int:
    """times `splitter`, in this case and no end of a longer word, before a number, as in IFEval."""
    return len(re.findall(rf"(?<![^\W_]){re.escape(splitter.strip())}\s?\d+", text))


# --- What is there, or is not ---


@_stays(True, settled_phrases)
def keywords(text: str, value: list[str]) -> bool:
    """Every word or phrase of `value` occurs as whole words, in any case.

    Marks of Markdown around it (`**river**`, `_river_`) are no part of it. Where a script has no
    spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), a phrase is found in longer
    words too; a Korean one also with particles after it. IFEval's `existence` finds all of them
    inside of other words.
    """
    return all(count_occurrences(word, text) for word in value)


@_stays(False, settled_phrases)
def forbidden_words(text: str, value: list[str]) -> bool:
    """No word or phrase of `value` occurs as whole words, in any case; see `keywords`."""
    return not any(count_occurrences(word, text) for word in value)


@_stays(False)
def no_commas(text: str) -> bool:
    """No comma, nor its Arabic, Chinese or Japanese form (which IFEval's `no_comma` allows)."""
    return set(",，、،").isdisjoint(text)


# One small letter before a prefix, and it is lowercase unless there is a capital in it.
@_stays(False, "a{}".format)
def lowercase(text: str) -> bool:
    """There are letters that have a case, and all of them are small.

    IFEval's `english_lowercase` asks for English as well; add `language` for that.
    """
    return text.islower()


@_stays(False, "A{}".format)
def uppercase(text: str) -> bool:
    """There are letters that have a case, and all of them are capitals; see `lowercase`."""
    return text.isupper()


@_stays(True)
def title(text: str) -> bool:
    """There is a title in <<double angle brackets>>, on one line and not blank, as in IFEval."""
    titles = re.findall(r"<<((?:(?!<<|>>)[^\n])+)>>", text)
    return any(each.strip("<> \t") for each in titles)


@_stays(True)
def postscript(text: str) -> bool:
    """A line starts with "P.S.", after marks such as `**`; in IFEval it stands anywhere in one."""
    return re.search(r"^[ \t>#*_]*P\.S\.", text, re.MULTILINE) is not None


# --- How it begins and ends ---


@_kind
def starts_with(text: str, ended: bool, value: str) -> Verdict:
    """The first characters are `value`, in this case, after white space; not in IFEval."""
    # A prefix with something after it, so that its own white space stays.
    begun = normal(text) if ended else normal(f"{settled_text(text)}.")[:-1]
    wanted = normal(value)
    if begun.startswith(wanted):
        return True
    return None if wanted.startswith(begun) and not ended else False


@_stays(None)
def ends_with(text: str, value: str) -> bool:
    """The last characters are `value`, in this case, before white space.

    IFEval's `end_checker` ignores the case, and quotation marks around the response.
    """
    return normal(text).endswith(normal(value))


@_kind
def quoted(text: str, ended: bool) -> Verdict:
    """The first and last characters are double quotation marks, straight or curly, around text.

    Further quotation marks between them are allowed, for speech. IFEval takes straight ones only.
    """
    text = text.strip()
    closing = {'"': '"', "“": "”"}.get(text[0])
    if not ended and closing:
        return None
    return bool(text[1:-1].strip()) and text[-1] == closing


@_kind
def repeats_prompt(text: str, ended: bool, prompt: str) -> Verdict:
    """The response begins with the words of the prompt, in any case, and goes on after them.

    Of a chat, the last message of the user counts. IFEval's `repeat_prompt` repeats an argument
    (that is `starts_with` here), and asks for nothing after it.
    """
    asked, given = words_of(prompt), words_of(text if ended else settled_words(text))
    if given[: len(asked)] != asked[: len(given)]:
        return False
    # A word has begun after the last one that was asked for, if not ended.
    goes_on = len(given) >= len(asked) and len(text.split()) > len(asked)
    return True if goes_on else False if ended else None


@_kind
def paragraph_first_word(text: str, ended: bool, index: int, value: str) -> Verdict:
    """Paragraph `index`, the first being 1, begins with the word `value`, in any case.

    Marks around the word are ignored, and bullets, headings and dashes before it. IFEval's
    `nth_paragraph_first_word` also asks for a number of paragraphs; add `num_paragraphs` for that.
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

    IFEval's `json_format` takes any JSON value, and one in a code fence.
    """
    decoder, space = json.JSONDecoder(parse_constant=refuse_constant), " \t\n\r"
    text = text.lstrip(space)
    if text and not text.startswith("{"):
        return False
    try:
        _, end = decoder.raw_decode(text)
    except (ValueError, RecursionError):
        # Thousands of opening brackets, a usual way for a small model to fail, end in the latter.
        return False if ended else None
    return False if text[end:].strip(space) else ended or None


@_kind
def numbered_list(text: str, ended: bool, value: int) -> Verdict:
    """The lines with numbers ("1. ", "2) ") go from 1 to `value`, in order; not in IFEval."""
    # More digits are no number of a list.
    found = re.findall(r"^[ \t]*(\d{1,9})[.)][ \t]+\S", text, re.MULTILINE)
    numbers, wanted = list(map(int, found)), list(range(1, value + 1))
    if ended:
        return numbers == wanted
    return None if numbers == wanted[: len(numbers)] else False


@_kind
def two_responses(text: str, ended: bool) -> Verdict:
    """Two different texts, separated by ******, which may also stand around them, as in IFEval."""
    parts = [part.strip() for part in text.split("******")]
    if ended:
        texts = list(filter(None, parts))
        return len(texts) == 2 and texts[0] != texts[1] and all(parts[1:-1])
    # Marks at the end may become the next separator.
    last, texts = parts.pop().rstrip("*").strip(), list(filter(None, parts))
    is_same = len(texts) == 2 and texts[0] == texts[1]
    return False if not all(parts[1:]) or len(texts) + bool(last) > 2 or is_same else None


@_kind
def one_of(text: str, ended: bool, value: list[str]) -> Verdict:
    """The response is one of the options and nothing else, in any case, marks aside.

    An option of nothing but marks has to be there as it is. IFEval's `constrained_response` asks
    only that an option is in it, so that an answer that names several passes.
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
    """The likeliest language is `value` by langdetect, whose random numbers get a fixed seed.

    Its guess is often wrong for less than about five words; so give the response a least number of
    words. A response without anything to tell a language by (digits, marks) fails; IFEval's
    `response_language` lets that pass, and draws other random numbers in each call. The extra
    `verify` has to be installed (`RewardError`).
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
    # A factory of our own: the package's default one is shared by all that use it, as is its seed.
    module = optional("langdetect.detector_factory", RewardError)
    factory = module.DetectorFactory()
    factory.load_profile(module.PROFILES_DIRECTORY)
    factory.set_seed(0)
    return factory
