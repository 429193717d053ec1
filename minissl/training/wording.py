"""Numbers and lists of names as words, for messages."""


def count_of(n, noun, plural=None):
    """Return a number and its noun. The plural is the noun with an s, if it is not given.

    >>> count_of(1, "image"), count_of(2000, "label"), count_of(2, "copy", "copies")
    ('1 image', '2,000 labels', '2 copies')
    """
    if n == 1:
        return f"1 {noun}"
    return f"{n:,} {plural or noun + 's'}"


def list_names(names, most=10):
    """Return names as one string.

    >>> list_names(["a", "b", "c"]), list_names(["a", "b", "c"], most=1)
    ('a, b, c', 'a and 2 more')
    """
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most:,} more"
    return text
