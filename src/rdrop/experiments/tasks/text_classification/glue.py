"""The facts about GLUE's tasks: their files, columns, classes and scores."""

from dataclasses import dataclass

TWO_SENTENCES = (("sentence1",), ("sentence2",))


@dataclass(frozen=True)
class GlueTask:
    folder: str
    """Of its files, as GLUE names it."""
    text: tuple[str, ...]
    """The column's name; where there are several, in the files and on the hub."""
    text2: tuple[str, ...]
    """Likewise of the second text; empty where there is none."""
    label: tuple[str, ...] = ("label",)
    classes: tuple[tuple[str, ...], ...] = ()
    """Of each class its name and how else it is written. Empty: labels are numbers from 0 to 5."""
    scores: tuple[str, ...] = ("accuracy",)
    """The first one selects and is compared."""
    dev: tuple[str, ...] = ("dev",)
    """The files that score: the split the literature calls dev."""
    hub_dev: tuple[str, ...] = ("validation",)
    may_be_empty: bool = False
    """Whether texts without a character belong to the data."""


def _numbered(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name, str(number)) for number, name in enumerate(names))


ENTAILMENT = (("entailment",), ("not_entailment",))

GLUE = {
    "cola": GlueTask("CoLA", ("sentence",), (), classes=_numbered("unacceptable", "acceptable"), scores=("mcc",)),
    "sst2": GlueTask("SST-2", ("sentence",), (), classes=_numbered("negative", "positive")),
    "mrpc": GlueTask(
        "MRPC",
        ("sentence1", "#1 String"),  # the second as in GLUE's own file
        ("sentence2", "#2 String"),
        label=("label", "Quality"),
        classes=_numbered("not_equivalent", "equivalent"),
        scores=("accuracy", "f1"),
    ),
    "stsb": GlueTask("STS-B", *TWO_SENTENCES, label=("score", "label"), scores=("pearson", "spearman")),
    "qqp": GlueTask(
        "QQP",
        ("question1",),
        ("question2",),
        label=("is_duplicate", "label"),
        classes=_numbered("not_duplicate", "duplicate"),
        scores=("accuracy", "f1"),
        may_be_empty=True,  # Quora published a few such questions
    ),
    "mnli": GlueTask(
        "MNLI",
        ("sentence1", "premise"),
        ("sentence2", "hypothesis"),
        label=("gold_label", "label"),
        classes=(("entailment",), ("neutral",), ("contradiction",)),
        dev=("dev_matched", "dev_mismatched"),
        hub_dev=("validation_matched", "validation_mismatched"),
    ),
    "qnli": GlueTask("QNLI", ("question",), ("sentence",), classes=ENTAILMENT),
    "rte": GlueTask("RTE", *TWO_SENTENCES, classes=ENTAILMENT),
}

SCORE_RANGE = (0.0, 5.0)
"""Of the only task whose labels are numbers, STS-B."""
