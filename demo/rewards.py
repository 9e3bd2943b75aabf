"""Rewards for rl.py, as plain functions with TRL's signature: one number for each completion.

A function gets prompts, completions (texts), completion_ids, and every other key of the records, one value for each
completion. None means that it does not apply to a completion. Names in reward_funcs: "demo/rewards.py:keyword_recall".
"""

import re


def keyword_recall(completions, keywords, **_):
    """Share of a record's keywords that the reply mentions; Latin ones must be whole words. None: no keywords."""
    return [
        sum(_mentions(text, word) for word in words) / len(words) if words else None
        for text, words in zip(completions, keywords)
    ]


def ends_with_a_sentence(completions, **_):
    """1 if the reply ends as a sentence does."""
    return [float(text.rstrip().endswith((".", "!", "?", "。", "!", "?"))) for text in completions]


def sum_is_right(completions, answer, **_):
    """1 if the last line of the reply is the answer; of make_sums.py's world."""
    return [float(text.strip().split("\n")[-1] == str(right)) for text, right in zip(completions, answer)]


def _mentions(text, word):
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)" if word.isascii() else re.escape(word)
    return bool(re.search(pattern, text, re.IGNORECASE))
