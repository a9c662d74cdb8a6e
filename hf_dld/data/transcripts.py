"""Transcripts as a corpus has them, rewritten as they are to be learnt: marks, case, words that were cut in two."""

import re
from collections.abc import Sequence

TEXT_CASES = ("lower", "upper")


def rewrite_transcript(text: str | None, case: str | None, rules: Sequence[Sequence[str]]) -> str | None:
    r"""A transcript after all rules, in this case, with single spaces; None stays None.

    Rules are pairs of a regular expression and the text that takes the place of each match, groups as `\1`, one after
    the other: `(" '(s|t)\b", r"'\1")` joins "it 's"; `("<unk>", "")` takes a mark away. One that matches a whole
    transcript, `("^ignore_time_segment_in_scoring$", "")`, leaves nothing, which is no transcript.
    """
    if text is None or not (rules or case):
        return text
    text = " ".join(text.split())
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    text = {"lower": str.lower, "upper": str.upper, None: str}[case](text)
    return " ".join(text.split())


def check_text_rules(case: str | None, rules: Sequence[Sequence[str]]) -> None:
    """Raise `ValueError` for a case or a rule that `rewrite_transcript` could not apply."""
    if case not in (None, *TEXT_CASES):
        raise ValueError(f"text_case must be one of {TEXT_CASES}, or None for transcripts as they are; got {case!r}.")
    for rule in rules:
        if isinstance(rule, str) or len(rule) != 2 or not all(isinstance(part, str) for part in rule):
            raise ValueError(f"A rule of text_rules must be a regular expression and a text; got {rule!r}.")
        pattern, replacement = rule
        try:
            re.sub(pattern, replacement, "")  # looks at both, whether anything matches or not
        except (re.error, IndexError) as error:
            raise ValueError(
                f"The rule {pattern!r} to {replacement!r} of text_rules cannot be used: {error}."
            ) from None
