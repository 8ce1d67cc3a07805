"""R-Drop in the Hugging Face Trainer."""

from rdrop.integrations.transformers.trainer import RDropMixin as RDropMixin
from rdrop.integrations.transformers.trainer import RDropSeq2SeqTrainer as RDropSeq2SeqTrainer
from rdrop.integrations.transformers.trainer import RDropTrainer as RDropTrainer
from rdrop.integrations.transformers.trainer import Target as Target
