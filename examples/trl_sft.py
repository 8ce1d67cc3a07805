"""R-Drop in TRL's supervised fine-tuning: a small model from scratch learns which of two numbers is larger.

    python examples/trl_sft.py

Needs pip install '.[trl]' in the clone. With a model of the Hub: `model="Qwen/Qwen3-0.6B"`, no processing_class, and
either LoRA with `peft_config=LoraConfig(lora_dropout=0.1)`, or `model_init_kwargs={"attention_dropout": 0.1}` in the
SFTConfig. Such models have no dropout of their own, and without any R-Drop does nothing.
"""

import random
import tempfile
from itertools import permutations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig

from rdrop.integrations.trl import RDropSFTTrainer

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
WORDS = ["<pad>", "<end>", "or", "larger:", *NUMBERS]
PAIRS = [
    {"prompt": f"{a} or {b} larger: ", "completion": max(a, b, key=NUMBERS.index)} for a, b in permutations(NUMBERS, 2)
]
random.Random(0).shuffle(PAIRS)


def words_as_tokens() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def small_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), attention_dropout=0.1, **sizes))


def train(alpha: float, updates: int = 120) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = RDropSFTTrainer(
            model=small_llama(),
            args=SFTConfig(
                folder,
                max_steps=updates,
                per_device_train_batch_size=32,
                learning_rate=1e-2,
                logging_steps=50,
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                dataloader_pin_memory=False,
                activation_checkpointing=False,  # TRL's default saves memory, which this model does not need
            ),
            train_dataset=Dataset.from_list(PAIRS[:128]),
            eval_dataset=Dataset.from_list(PAIRS[128:]),
            processing_class=words_as_tokens(),
            alpha=alpha,  # the paper's; 0 is plain training
        )
        trainer.train()
        return trainer.evaluate()


def main() -> None:
    for alpha in (0.0, 1.0):
        scores = train(alpha)
        print(
            f"alpha {alpha:g}: loss {scores['eval_loss']:.3f} and token accuracy "
            f"{scores['eval_mean_token_accuracy']:.3f} on pairs not seen"
        )


if __name__ == "__main__":
    main()
