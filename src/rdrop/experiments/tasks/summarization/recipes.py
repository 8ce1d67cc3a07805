"""Summarization: a sequence-to-sequence model reads a document and writes its summary.

`cnn-dailymail` is the paper's experiment: BART-large, fine-tuned. `aeslc` writes the subject line of an e-mail with a
small model from scratch, in minutes on a CPU. `summarization` is for files of your own. docs/tasks/summarization.md has
the layouts of the data, and how the summaries are written and scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rdrop.experiments.recipe import SYNTHETIC, DataFiles, DecodingSection, NewOrPretrainedModel, Recipe
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.recipe.published import Published
from rdrop.experiments.recipe.settings import Count, Probability, RecipeError

Vocabulary = Annotated[Count, Field(ge=260)]  # 256 bytes and 4 special tokens


class SummarizationData(DataFiles):
    document_column: str = Field(description="The column with the document.")
    summary_column: str = Field(description="The column with its summary; a newline in it ends a sentence.")
    reference_columns: list[str] = Field(
        description="Columns of the test split with more reference summaries: the best of all counts."
    )
    counts: Annotated[list[Count], Field(min_length=3, max_length=3)] | None = Field(
        description="Examples of train, valid and test that `folder` and `hub` must have. null: any number."
    )
    valid_examples: Count | None = Field(
        description="How many examples of the valid split are scored, from its first: writing summaries takes long. "
        "null: all."
    )
    prefix: str = Field(description='Text before every document, which some models want: "summarize: " for T5.')
    document_tokens: Count = Field(description="A longer document is cut to this many tokens.")
    summary_tokens: Count = Field(description="A summary to learn from that is longer is cut to this many tokens.")


class SummarizationModel(NewOrPretrainedModel):
    SIZES: ClassVar[Mapping[str, int | bool]] = {"vocabulary": 8000, "lowercase": True, **NewOrPretrainedModel.SIZES}
    name: str | None = Field(
        None,
        description="A pre-trained sequence-to-sequence model: its id on the Hugging Face hub, or its folder. null: "
        "BART's architecture from scratch, of the size that the next keys say.",
    )
    vocabulary: Vocabulary | None = Field(
        None, description="Entries of the byte-level BPE learned from the training text, at most."
    )
    lowercase: bool | None = Field(None, description="Whether that BPE, and with it the model, knows lower case only.")
    layers: Count | None = Field(None, description="Layers of the encoder, and of the decoder.")
    hidden_size: Count | None = Field(None, description="Width of the residual stream.")
    heads: Count | None = Field(None, description="Attention heads per layer.")
    intermediate_size: Count | None = Field(None, description="Width of the feed-forward layers.")
    dropout: Probability = Field(description="Rate after the embeddings, the attention and the feed-forward layers.")
    attention_dropout: Probability | None = Field(
        description="Rate on the attention probabilities. null: for a model that has no such rate, such as T5."
    )
    activation_dropout: Probability | None = Field(
        description="Rate inside the feed-forward layers. null: for a model that has no such rate."
    )


class SummarizationDecoding(DecodingSection):
    min_length: int = Field(ge=0, description="Tokens before a summary may end.")
    max_length: Count = Field(description="Tokens after which it ends.")
    no_repeat_ngram: int = Field(ge=0, description="No sequence of this many tokens is written twice. 0: any may be.")


class SummarizationRecipe(Recipe):
    """A document and its summary: any sequence-to-sequence model, scored by ROUGE."""

    TASK = "rdrop.experiments.tasks.summarization.task:Summarization"
    task: Literal["summarization"] = Field(description=Recipe.model_fields["task"].description)
    data: SummarizationData
    model: SummarizationModel
    decoding: SummarizationDecoding = Field(description="How summaries are written: the task's own keys.")

    def tiny(self) -> Self:
        return self._tiny(
            learning_rate=3e-3,
            batch_size=8,
            batch_tokens=None,
            **SYNTHETIC,
            **{
                "data.document_tokens": 32,
                "data.summary_tokens": 16,
                "model.name": None,
                "model.vocabulary": 300,
                "model.lowercase": True,
                "model.layers": 1,
                "model.hidden_size": 32,
                "model.heads": 2,
                "model.intermediate_size": 64,
                "decoding.min_length": 0,
                "decoding.max_length": 16,
            },
        )

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        decoding = self.decoding
        if decoding.min_length > decoding.max_length:
            raise RecipeError(
                "decoding.min_length",
                f"must be at most decoding.max_length (={decoding.max_length})",
                value=decoding.min_length,
            )
        columns = [self.data.document_column, self.data.summary_column, *self.data.reference_columns]
        if len(set(columns)) != len(columns):
            raise RecipeError("data.summary_column", f"the columns must differ, got {', '.join(columns)}")
        return self


CNN_DAILYMAIL = SummarizationRecipe(
    name="cnn-dailymail",
    task="summarization",
    method=Method(alpha=0.7),  # paper
    updates=20_000,  # official settings, from here on where nothing else is said
    batch_tokens=65_536,  # 1,024 tokens x 16 accumulation steps x 4 GPUs
    accumulation=16,
    beta1=0.9,  # official settings, with beta2=0.999
    learning_rate=3e-5,
    schedule="linear",  # polynomial of power 1
    warmup_updates=500,
    weight_decay=0.01,
    clip_norm=0.1,
    label_smoothing=0.1,
    precision="bf16",  # our choice
    evaluate_every=1000,  # our choice: twenty scores
    checkpoint_every=1000,  # our choice, these two
    data=SummarizationData(
        hub="abisee/cnn_dailymail",
        hub_config="3.0.0",
        document_column="article",
        summary_column="highlights",
        reference_columns=[],
        counts=[287_113, 13_368, 11_490],
        valid_examples=500,  # our choice: beam search over all 13,368 would take longer than the updates between
        prefix="",
        document_tokens=1024,  # the model's longest input
        summary_tokens=256,  # our choice: more than may be written
    ),
    model=SummarizationModel(
        name="facebook/bart-large",
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.0,
    ),
    decoding=SummarizationDecoding(
        beams=4,
        length_penalty=2.0,
        min_length=55,
        max_length=140,
        no_repeat_ngram=3,
        batch_size=32,
    ),
)

# Our choices, all of them, ranked on the valid split: a run with alpha=0 and one with R-Drop are to take 12 minutes
# together, on one thread.
AESLC = CNN_DAILYMAIL.replace(
    name="aeslc",
    updates=7000,  # eight epochs
    batch_size=16,
    batch_tokens=None,
    accumulation=1,
    learning_rate=2e-3,
    warmup_updates=400,
    clip_norm=1.0,
    label_smoothing=0.0,  # off: it slows a small model down
    precision="fp32",
    evaluate_every=500,
    checkpoint_every=500,
    **{
        "data.hub": None,
        "data.hub_config": None,
        "data.document_column": "document",
        "data.summary_column": "subject",
        "data.counts": [14_436, 1_960, 1_906],
        "data.valid_examples": 500,
        "data.document_tokens": 40,  # most of what a subject line says stands at the beginning of the e-mail
        "data.summary_tokens": 12,
        "model.name": None,
        "model.vocabulary": 2000,
        "model.lowercase": True,  # ROUGE does not see the case
        "model.layers": 1,
        "model.hidden_size": 128,
        "model.heads": 4,
        "model.intermediate_size": 256,
        "decoding.length_penalty": 1.0,
        "decoding.min_length": 1,
        "decoding.max_length": 14,
        "decoding.no_repeat_ngram": 0,
        "decoding.batch_size": 128,
    },
)

# For files of your own: the settings of CNN/DailyMail, and a smaller model for fewer updates.
SUMMARIZATION = CNN_DAILYMAIL.replace(
    name="summarization",
    updates=3000,  # our choices, all of these
    batch_size=32,
    batch_tokens=None,
    accumulation=4,
    warmup_updates=300,
    evaluate_every=250,
    checkpoint_every=250,
    **{
        "data.hub": None,
        "data.hub_config": None,
        "data.document_column": "document",
        "data.summary_column": "summary",
        "data.counts": None,
        "data.valid_examples": 200,
        "model.name": "facebook/bart-base",
        "decoding.length_penalty": 1.0,
        "decoding.min_length": 0,
        "decoding.batch_size": 16,
    },
)

RECIPES = (CNN_DAILYMAIL, AESLC, SUMMARIZATION)

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "cnn-dailymail": tuple(
        Published(
            dataset="CNN/DailyMail",
            metric=metric,
            model="BART",
            baseline=baseline,
            rdrop=rdrop,
            source="Liang et al. 2021, table 4",
            headline=True,
        )
        for metric, baseline, rdrop in (
            ("ROUGE-1", 44.16, 44.51),
            ("ROUGE-2", 21.28, 21.58),
            ("ROUGE-L", 40.90, 41.24),
        )
    ),
}
DATASETS = {"aeslc": "AESLC"}
