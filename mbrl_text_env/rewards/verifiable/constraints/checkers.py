"""The checkers: one function a type of constraint, which is called by its name.

A checker takes the response, not blank, and the constraint's arguments by name, of the types that
its signature says. One that has a parameter `prompt` is given the text of the prompt.

Most types follow IFEval: Zhou et al., "Instruction-Following Evaluation for Large Language
Models", 2023, and its code, https://github.com/google-research/google-research (folder
instruction_following_eval). Each docstring says how it deviates. Common to all: words are counted
in any script that puts spaces between them, texts are compared in Unicode's composed form, curly
apostrophes are straight ones, counts given as "less than n" there are "at most" here, and what
needs a tokenizer of NLTK there is done by rules that are written here.
"""

# ruff: noqa: RUF001 - the commas, quotation marks and full stops of other scripts are meant.

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NewType

from mbrl_text_env.files import refuse_constant
from mbrl_text_env.rewards.verifiable.constraints.counting import (
    bare_words,
    count_bullets,
    count_capital_words,
    count_highlights,
    count_letter,
    count_occurrences,
    count_paragraphs,
    count_placeholders,
    count_sections,
    count_words,
    list_numbers,
    normal,
    paragraphs_of,
    words_of,
)
from mbrl_text_env.rewards.verifiable.constraints.sentences import count_sentences
from mbrl_text_env.rewards.verifiable.isolated import import_optional

Letter = NewType("Letter", str)
"""An argument that is one letter, digit or mark."""

LanguageCode = NewType("LanguageCode", str)
"""An argument that is one of `LANGUAGES`."""

LANGUAGES = frozenset(
    re.findall(
        r"\S+",
        "af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml "
        "mr ne nl no pa pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw",
    )
)
"""The languages that langdetect knows, by their codes (mostly of ISO 639-1)."""

COMMAS = frozenset(",，、،")
DOUBLE_QUOTES = {'"': '"', "“": "”"}
RESPONSE_SPLITTER = "******"

_POSTSCRIPT = re.compile(r"^[ \t>#*_]*P\.S\.", re.MULTILINE)
_TITLE = re.compile(r"<<((?:(?!<<|>>)[^\n])+)>>")


def max_words(response: str, value: int) -> bool:
    """At most `value` words; see `min_words`."""
    return count_words(response) <= value


def min_words(response: str, value: int) -> bool:
    """At least `value` words: runs without white space that have a letter or a digit in them.

    A Chinese, Japanese or Thai text without spaces is one word. IFEval's `number_words` counts runs
    of letters, digits and underscores: "don't" is two there.
    """
    return count_words(response) >= value


def num_sentences(response: str, value: int) -> bool:
    """Exactly `value` sentences.

    A sentence ends at a full stop, question mark, exclamation mark or ellipsis that is followed by
    white space, at the full stops of other scripts (Chinese, Japanese, Hindi, Arabic, Urdu and
    more), at a blank line and at the end. Numbers of a list, English titles such as "Dr." and marks
    without any words do not count. Initials ("J. K. Rowling") and abbreviations such as "U.S.",
    "Ph.D." and "Inc." end a sentence where a word follows that usually begins one, such as "The";
    "p.m." and "etc." where a capital letter follows. Speech that ends in a mark of its own
    ('"Stop!" she said.') does.

    IFEval's `number_sentences` asks NLTK's punkt, and only for less than or at least a number.
    """
    return count_sentences(response) == value


def max_sentences(response: str, value: int) -> bool:
    """At most `value` sentences; see `num_sentences`."""
    return count_sentences(response) <= value


def num_paragraphs(response: str, value: int) -> bool:
    """Exactly `value` paragraphs, separated by one or more blank lines.

    IFEval's `number_paragraphs` has them separated by "***".
    """
    return count_paragraphs(response) == value


def num_bullets(response: str, value: int) -> bool:
    """Exactly `value` lines that start with "-" or "*" and white space, and go on.

    Indentation is ignored. A rule across the page, such as "* * *", is none. IFEval's
    `number_bullet_lists` asks for no space after the mark.
    """
    return count_bullets(response) == value


def keywords(response: str, value: list[str]) -> bool:
    """Every word or phrase of `value` occurs as whole words, in any case.

    Marks of Markdown around it (`**river**`, `_river_`) are no part of it. Where a script has no
    spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), a phrase is found wherever
    its characters stand, in longer words too; a Korean one also with particles after it. IFEval's
    `existence` finds all of them inside of other words.
    """
    return all(count_occurrences(word, response) for word in value)


def keyword_count(response: str, keyword: str, value: int) -> bool:
    """`keyword` occurs at least `value` times as a whole word, in any case; see `keywords`.

    IFEval's `frequency` counts it inside of other words, too.
    """
    return count_occurrences(keyword, response) >= value


def forbidden_words(response: str, value: list[str]) -> bool:
    """No word or phrase of `value` occurs as whole words, in any case; see `keywords`."""
    return not any(count_occurrences(word, response) for word in value)


def no_commas(response: str) -> bool:
    """No comma, nor its Arabic, Chinese or Japanese form (which IFEval's `no_comma` allows)."""
    return COMMAS.isdisjoint(response)


def lowercase(response: str) -> bool:
    """There are letters that have a case, and all of them are small.

    IFEval's `english_lowercase` asks langdetect for English as well; add `language` for that.
    """
    return response.islower()


def uppercase(response: str) -> bool:
    """There are letters that have a case, and all of them are capitals; see `lowercase`."""
    return response.isupper()


def starts_with(response: str, value: str) -> bool:
    """The first characters are `value`, in this case; white space around either is ignored.

    There is no such type in IFEval.
    """
    return normal(response).startswith(normal(value))


def ends_with(response: str, value: str) -> bool:
    """The last characters are `value`, in this case; white space around either is ignored.

    IFEval's `end_checker` ignores the case, and quotation marks around the response.
    """
    return normal(response).endswith(normal(value))


def quoted(response: str) -> bool:
    """The first and last characters are double quotation marks, straight or curly, around text.

    Further quotation marks between them are allowed, for a quotation may have speech in it. IFEval
    takes straight ones only.
    """
    text = response.strip()
    return (
        bool(text[1:-1].strip()) and text[0] in DOUBLE_QUOTES and text[-1] == DOUBLE_QUOTES[text[0]]
    )


def title(response: str) -> bool:
    """There is a title in <<double angle brackets>>, on one line and not blank, as in IFEval."""
    return any(text.strip("<> \t") for text in _TITLE.findall(response))


def postscript(response: str) -> bool:
    """There is a line that starts with "P.S."; indentation and marks such as `**` are ignored.

    IFEval's also takes "p. s." and the middle of a line.
    """
    return _POSTSCRIPT.search(response) is not None


def placeholders(response: str, value: int) -> bool:
    """At least `value` [bracketed] placeholders, not blank; repeated ones count each time.

    IFEval's `number_placeholders` counts blank ones, too.
    """
    return count_placeholders(response) >= value


def json_object(response: str) -> bool:
    """The whole response is a JSON object, without a code fence or other text around it.

    IFEval's `json_format` takes any JSON value, and one in a code fence.
    """
    try:
        return isinstance(json.loads(response, parse_constant=refuse_constant), dict)
    except (ValueError, RecursionError):
        # Thousands of opening brackets, a usual way for a small model to fail, end in the latter.
        return False


def min_sentences(response: str, value: int) -> bool:
    """At least `value` sentences; see `num_sentences`."""
    return count_sentences(response) >= value


def min_paragraphs(response: str, value: int) -> bool:
    """At least `value` paragraphs; see `num_paragraphs`."""
    return count_paragraphs(response) >= value


def max_paragraphs(response: str, value: int) -> bool:
    """At most `value` paragraphs; see `num_paragraphs`."""
    return count_paragraphs(response) <= value


def max_keyword_count(response: str, keyword: str, value: int) -> bool:
    """`keyword` occurs at most `value` times as a whole word; see `keyword_count`."""
    return count_occurrences(keyword, response) <= value


def exact_keyword_count(response: str, keyword: str, value: int) -> bool:
    """`keyword` occurs exactly `value` times as a whole word; see `keyword_count`."""
    return count_occurrences(keyword, response) == value


def min_letter_count(response: str, letter: Letter, value: int) -> bool:
    """`letter`, small or capital, occurs at least `value` times, as in IFEval.

    It may be a digit or a mark, such as "#", too.
    """
    return count_letter(response, letter) >= value


def max_letter_count(response: str, letter: Letter, value: int) -> bool:
    """`letter`, small or capital, occurs at most `value` times."""
    return count_letter(response, letter) <= value


def min_capital_words(response: str, value: int) -> bool:
    """At least `value` words in capitals, marks and digits aside: "NO", "I", "B-52s" not.

    IFEval's `capital_word_frequency` separates words from marks with NLTK first; the count differs
    where a word holds both, as in "HE'll".
    """
    return count_capital_words(response) >= value


def max_capital_words(response: str, value: int) -> bool:
    """At most `value` words in capitals; see `min_capital_words`."""
    return count_capital_words(response) <= value


def numbered_list(response: str, value: int) -> bool:
    """The lines with numbers ("1. ", "2) ") are numbered from 1 to `value`, one after the other.

    Indentation is ignored. There is no such type in IFEval.
    """
    return list_numbers(response) == list(range(1, value + 1))


def highlights(response: str, value: int) -> bool:
    """At least `value` *highlighted* or **highlighted** parts of lines.

    Spaces inside the marks at either end make none, as in Markdown, so that "2 * 3 * 4" has none;
    IFEval's `number_highlighted_sections` counts those.
    """
    return count_highlights(response) >= value


def sections(response: str, splitter: str, value: int) -> bool:
    """At least `value` times `splitter`, such as "Section", before a number, as in IFEval.

    It has to be in this case, and no end of a longer word.
    """
    return count_sections(response, splitter) >= value


def language(response: str, value: LanguageCode) -> bool:
    """The likeliest language is `value` by langdetect, whose random numbers get a fixed seed.

    Short texts get its best guess, too, which is often wrong for less than about five words; so
    give the response a least number of words. A response without anything to tell a language by
    (digits, marks) fails. IFEval's `response_language` lets that pass, and draws other random
    numbers in each call.

    Raises:
        RewardError: The extra `verify` is not installed.
    """
    from langdetect.lang_detect_exception import LangDetectException

    detector = _detectors().create()
    detector.append(response)
    try:
        return bool(detector.detect() == value)
    except LangDetectException:
        return False


def repeats_prompt(response: str, prompt: str) -> bool:
    """The response begins with the words of the prompt, in any case, and goes on after them.

    Of a chat, the last message of the user counts. IFEval's `repeat_prompt` repeats a text that is
    an argument (that is `starts_with` here), and asks for nothing after it.
    """
    asked, given = words_of(prompt), words_of(response)
    return len(given) > len(asked) and given[: len(asked)] == asked


def two_responses(response: str) -> bool:
    """Two different texts, separated by ******.

    As in IFEval, there may be the same marks before the first and after the second.
    """
    parts = [part.strip() for part in response.split(RESPONSE_SPLITTER)]
    texts = [part for part in parts if part]
    return len(texts) == 2 and texts[0] != texts[1] and all(parts[1:-1])


def paragraph_first_word(response: str, index: int, value: str) -> bool:
    """Paragraph `index`, the first being 1, begins with the word `value`, in any case.

    Marks around the word are ignored, and bullets, headings and dashes before it. IFEval's
    `nth_paragraph_first_word` also asks for a number of paragraphs; add `num_paragraphs` for that.
    """
    paragraphs = paragraphs_of(response.strip())
    return index <= len(paragraphs) and (
        bare_words(paragraphs[index - 1])[:1] == bare_words(value)[:1]
    )


def one_of(response: str, value: list[str]) -> bool:
    """The response is one of the options and nothing else, in any case, marks aside.

    An option of nothing but marks has to be there as it is.
    IFEval's `constrained_response` asks only that an option is in it, so that an answer that names
    several passes.
    """
    return bare_words(response) in [bare_words(option) for option in value]


@lru_cache(maxsize=1)
def _detectors() -> Any:
    # A factory of our own: the package's default one is shared by all that use it, as is its seed.
    module = import_optional("langdetect.detector_factory", "langdetect", "verify")
    factory = module.DetectorFactory()
    factory.load_profile(module.PROFILES_DIRECTORY)
    factory.set_seed(0)
    return factory


CONSTRAINT_TYPES: Mapping[str, Callable[..., bool]] = {
    function.__name__: function
    for function in (
        max_words,
        min_words,
        num_sentences,
        max_sentences,
        num_paragraphs,
        num_bullets,
        keywords,
        keyword_count,
        forbidden_words,
        no_commas,
        lowercase,
        uppercase,
        starts_with,
        ends_with,
        quoted,
        title,
        postscript,
        placeholders,
        json_object,
        min_sentences,
        min_paragraphs,
        max_paragraphs,
        max_keyword_count,
        exact_keyword_count,
        min_letter_count,
        max_letter_count,
        min_capital_words,
        max_capital_words,
        numbered_list,
        highlights,
        sections,
        language,
        repeats_prompt,
        two_responses,
        paragraph_first_word,
        one_of,
    )
}
"""The checkers by the name of their constraint, called as `checker(response, **arguments)`.

They expect a response that is not empty and arguments of the right type: call them through
`check_constraint`, which sees to both.
"""
