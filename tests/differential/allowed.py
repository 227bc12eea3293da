"""The kinds of refusals that the product may give, and the sentences that belong to each.

Each is drawn on purpose, on something that has no right reading. Any other refusal is a fault of the product.
"""

REFUSALS = {
    # of models
    "weights missing": r"(lacks|missing|without a classifier)",
    "weights not finite": r"(not finite|non-finite|NaN)",
    "adapter": r"(adapter|PEFT)",
    # of labels
    "no label": r"has no label in row \d+; every row needs one",
    "unknown class": r"has the class '.*', which the model does not know",
    "label out of range": r"has label \d+ in row \d+, but (the model has|it names) \d+ classes",
    # of a ClassLabel column, an unknown name is one class more than a model without names has
    "no class": r"(labels must be whole numbers or class names|which look like one class|has label \d+ in row \d+)",
    # of files
    "encoding": r"(is in UTF-16|is not in UTF-8)",
    "quotation": r"(quotation mark in line \d+|cells in line \d+, but its first line names \d+ columns?)",
    "kind of file": r"(is compressed|by its content, although its name says)",
    "splits": r"(holds|matches several) splits",
    "empty folder": r"has no pictures in aardvark",
    # of examples
    "empty text": r"has an empty text in row \d+",
    "picture": r"has a picture in row \d+.* that cannot be decoded",
}

# Of a hundred drawn cases at most so many may be refused.
MOST = 10
