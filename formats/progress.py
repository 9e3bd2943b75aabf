"""What long work calls now and then, so that a server can end it: tokenizing and templates have no other way out."""

import contextvars


class AbortedWork(Exception):
    """check_progress wants no more of it."""


# A server sets it for a request. Its argument is the number of ids so far; it raises AbortedWork where nobody waits for
# the rest, or where there are too many.
check_progress = contextvars.ContextVar("check_progress", default=lambda count: None)
