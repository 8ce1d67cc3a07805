"""What was tried with which library: the table of docs/integrations.md, where each cell names its test.

python tests/integrations/support.py      writes the table into the page
"""

import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/integrations.md"
EMPTY = ("", "")
LOOP = ("your loop's", "")
NONE = ("none in the library", "")
COLUMNS = ("gradient", "accumulation", "2 processes", "alpha 0", "evaluation", "resumed", "program")

LIGHTNING = "test_lightning.py::test_"

ENCODERS = "test_sentence_transformers.py::test_"
OF_TWO = "test_transformers_processes.py::test_"
OTHER = "test_other_trainers.py::test_"
TWO_PROCESSES = "test_two_processes_have_the_gradient_of_the_whole_batch_and_resume_to_the_same_bits"
BATCH_MEANS = "mean of batches"
"""The library's own: each batch is exact, and an update of several their mean."""

Cell = tuple[str, str]
"""What the reader sees, and the test behind it: `file.py::test_name`, in this folder."""


def of_another_trainer(accumulation: Cell, resumed: Cell) -> tuple[Cell, ...]:
    return (
        ("exact", f"{OTHER}an_epoch_of_another_trainer_ends_in_the_weights_of_a_loop_of_ones_own"),
        accumulation,
        (BATCH_MEANS, f"{OF_TWO}an_update_of_two_processes_of_another_trainer_is_that_of_the_mean_of_their_batches"),
        ("to the bit", f"{OTHER}at_alpha_zero_another_trainer_ends_in_the_weights_of_plain_training_to_the_bit"),
        ("the library's", f"{OTHER}another_trainer_evaluates_with_one_pass_and_no_dropout"),
        resumed,
        ("runs", f"{OTHER}the_example_of_another_trainer_learns"),
    )


TRAINER = "test_transformers.py::test_"
TRAINER_OF_TWO = f"{OF_TWO}two_processes_are_one_process"
PACKED = "test_transformers_packed.py::test_"
UNLABELED = "test_transformers_unlabeled.py::test_"
DEEPSPEED = "test_transformers_deepspeed.py::test_"
FSDP2 = f"{OF_TWO}an_update_of_fsdp2_is_that_of_the_loss_by_hand"
TRL = "test_trl.py::test_"
ACCELERATE = "test_accelerate_example.py::test_"
SUPPORT: dict[str, tuple[Cell, ...]] = {
    "Hugging Face Trainer": (
        ("exact", f"{TRAINER}gradient_of_an_update_is_the_hand_computed_one"),
        ("exact", f"{TRAINER}gradient_of_an_update_is_the_hand_computed_one"),
        ("exact", TRAINER_OF_TWO),
        ("to the bit", f"{TRAINER}alpha_zero_is_the_stock_trainer_bit_for_bit"),
        ("the library's", f"{TRAINER}evaluation_and_prediction_are_one_pass_and_the_stock_loss"),
        ("to the bit", f"{TRAINER}resuming_ends_in_the_same_bits"),
        ("runs", "test_transformers_example.py::test_the_example_trains_and_scores_with_and_without_rdrop"),
    ),
    "Hugging Face Trainer, `unlabeled_dataset`": (
        ("exact", f"{UNLABELED}the_gradient_has_the_divergence_of_the_unlabeled_beside_the_loss"),
        ("exact", f"{UNLABELED}the_gradient_has_the_divergence_of_the_unlabeled_beside_the_loss"),
        ("exact", TRAINER_OF_TWO),
        ("to the bit", f"{UNLABELED}plain_training_does_not_see_the_unlabeled"),
        ("the library's", f"{TRAINER}evaluation_and_prediction_are_one_pass_and_the_stock_loss"),
        ("to the bit", f"{UNLABELED}training_with_unlabeled_examples_resumes_to_the_same_bits"),
        EMPTY,
    ),
    "Hugging Face Trainer, FSDP2": (
        *[("exact", FSDP2)] * 4,
        ("the library's", f"{OF_TWO}fsdp2_evaluates_as_the_stock_trainer_and_resumes_to_the_same_bits"),
        ("to the bit", f"{OF_TWO}fsdp2_evaluates_as_the_stock_trainer_and_resumes_to_the_same_bits"),
        EMPTY,
    ),
    "Hugging Face Trainer, FSDP2, `fused`": (*[("exact", FSDP2)] * 3, *[EMPTY] * 4),
    "Hugging Face Trainer, DeepSpeed and FSDP 1, `fused`": (
        ("refused", f"{DEEPSPEED}the_output_layer_is_at_hand_without_shards_and_with_those_of_fsdp2"),
        *[EMPTY] * 6,
    ),
    "Hugging Face Trainer, DeepSpeed": (
        *[("exact", f"{DEEPSPEED}an_update_of_zero_is_that_of_the_loss_by_hand")] * 4,
        ("the library's", f"{DEEPSPEED}deepspeed_evaluates_as_the_stock_trainer_and_resumes_to_the_same_bits"),
        ("to the bit", f"{DEEPSPEED}deepspeed_evaluates_as_the_stock_trainer_and_resumes_to_the_same_bits"),
        EMPTY,
    ),
    'Hugging Face Trainer, DeepSpeed: `micro_batches`, `unlabeled_dataset`, `on_nonfinite="skip"`': (
        ("refused", f"{DEEPSPEED}what_needs_more_than_one_backward_is_refused_with_deepspeed"),
        *[EMPTY] * 6,
    ),
    "Hugging Face Trainer, packed rows": (
        ("exact", f"{PACKED}a_packed_row_has_the_gradient_of_its_sequences"),
        ("exact", f"{PACKED}packed_rows_of_an_update_have_the_gradient_of_all_their_sequences"),
        ("exact", TRAINER_OF_TWO),
        ("to the bit", f"{PACKED}at_alpha_zero_packed_rows_are_those_of_the_stock_trainer_to_the_bit"),
        ("the library's", f"{PACKED}packed_rows_are_evaluated_by_the_stock_trainer"),
        ("to the bit", f"{PACKED}training_on_packed_rows_resumes_to_the_same_bits"),
        EMPTY,
    ),
    "Hugging Face Trainer, packed rows whose sequences see each other": (
        ("refused", f"{PACKED}a_model_whose_sequences_see_each_other_is_refused_and_is_as_it_was"),
        *[EMPTY] * 6,
    ),
    "TRL, `SFTTrainer`": (
        ("exact", f"{TRL}the_gradient_of_fine_tuning_is_that_of_every_sequence_alone"),
        ("exact", f"{TRL}the_gradient_of_fine_tuning_is_that_of_every_sequence_alone"),
        ("exact", TRAINER_OF_TWO),
        ("to the bit", f"{TRL}at_alpha_zero_fine_tuning_is_trls_to_the_bit"),
        ("the library's", f"{TRL}the_evaluation_of_fine_tuning_is_trls"),
        ("to the bit", f"{TRL}fine_tuning_resumes_to_the_same_bits"),
        ("runs", f"{TRL}the_example_of_fine_tuning_learns_with_and_without_rdrop"),
    ),
    "TRL, `SFTTrainer`, LoRA with checkpointing": (
        ("exact", f"{TRL}the_gradient_of_lora_with_checkpointing_and_micro_batches_is_exact"),
        ("exact", f"{TRL}the_gradient_of_lora_with_checkpointing_and_micro_batches_is_exact"),
        ("exact", TRAINER_OF_TWO),
        ("to the bit", f"{TRL}at_alpha_zero_fine_tuning_is_trls_to_the_bit"),
        ("the library's", f"{TRL}the_evaluation_of_fine_tuning_is_trls"),
        ("to the bit", f"{TRL}fine_tuning_resumes_to_the_same_bits"),
        EMPTY,
    ),
    "TRL, `SFTTrainer`, router's loss": (
        ("exact", f"{TRL}the_routers_loss_is_added_once_with_trls_coefficient"),
        ("exact", f"{TRL}the_routers_loss_is_added_once_with_trls_coefficient"),
        ("exact", TRAINER_OF_TWO),
        ("to the bit", f"{TRL}at_alpha_zero_fine_tuning_is_trls_to_the_bit"),
        ("the library's", f"{TRL}the_evaluation_of_fine_tuning_is_trls"),
        ("to the bit", f"{TRL}fine_tuning_resumes_to_the_same_bits"),
        EMPTY,
    ),
    "TRL: `dft`, `compute_loss_func`, Liger's kernels": (
        ("refused", f"{TRL}losses_that_r_drop_would_replace_are_refused_by_name"),
        *[EMPTY] * 6,
    ),
    "TRL, `RewardTrainer`, by the program": (
        ("exact", f"{TRL}the_gradient_of_reward_modeling_is_that_of_the_margins_by_hand"),
        (BATCH_MEANS, f"{TRL}the_gradient_of_reward_modeling_is_that_of_the_margins_by_hand"),
        (BATCH_MEANS, TRAINER_OF_TWO),
        ("to the bit", f"{TRL}at_alpha_zero_and_in_evaluation_reward_modeling_is_trls_to_the_bit"),
        ("the library's", f"{TRL}at_alpha_zero_and_in_evaluation_reward_modeling_is_trls_to_the_bit"),
        ("to the bit", f"{TRL}reward_modeling_resumes_to_the_same_bits"),
        ("runs", f"{TRL}the_example_of_reward_modeling_learns_with_and_without_rdrop"),
    ),
    "Accelerate": (
        ("exact", f"{ACCELERATE}the_gradient_of_two_processes_is_that_of_the_whole_batch"),
        ("exact", f"{ACCELERATE}the_gradient_of_two_processes_is_that_of_the_whole_batch"),
        ("exact", f"{ACCELERATE}the_gradient_of_two_processes_is_that_of_the_whole_batch"),
        *[LOOP] * 3,
        ("runs", f"{ACCELERATE}the_example_learns_with_and_without_rdrop"),
    ),
    "Fabric": (
        ("exact", f"{LIGHTNING}the_gradient_of_an_update_of_fabric_is_that_of_the_whole_batch"),
        ("exact", f"{LIGHTNING}the_gradient_of_an_update_of_fabric_is_that_of_the_whole_batch"),
        ("exact", f"test_lightning.py::{TWO_PROCESSES}"),
        *[LOOP] * 3,
        ("runs", f"{LIGHTNING}the_fabric_example_learns_with_and_without_rdrop"),
    ),
    "Lightning": (
        ("exact", f"{LIGHTNING}the_gradient_of_an_update_of_lightning_is_that_of_the_whole_batch"),
        ("exact", f"{LIGHTNING}the_gradient_of_an_update_of_lightning_is_that_of_the_whole_batch"),
        ("exact", f"test_lightning.py::{TWO_PROCESSES}"),
        ("to the bit", f"{LIGHTNING}at_alpha_zero_training_is_plain_lightning_to_the_bit"),
        ("the library's", f"{LIGHTNING}validation_of_lightning_is_the_modules_own"),
        ("to the bit", f"test_lightning.py::{TWO_PROCESSES}"),
        ("runs", f"{LIGHTNING}the_lightning_example_learns_with_and_without_rdrop_and_goes_on"),
    ),
    "Lightning: FSDP, DeepSpeed, two optimizers": (
        ("refused", f"{LIGHTNING}strategies_and_optimizers_whose_update_is_not_known_are_refused"),
        *[EMPTY] * 6,
    ),
    "sentence-transformers, cross-encoders": (
        ("exact", f"{ENCODERS}the_loss_and_its_gradient_are_those_written_out"),
        (BATCH_MEANS, f"{ENCODERS}an_accumulated_update_is_that_of_the_mean_of_its_batches"),
        (BATCH_MEANS, TRAINER_OF_TWO),
        ("to the bit", f"{ENCODERS}at_alpha_zero_it_is_the_loss_of_the_library_to_the_bit"),
        ("the library's", f"{ENCODERS}the_trainer_evaluates_as_with_the_loss_of_the_library"),
        ("to the bit", f"{ENCODERS}alpha_rises_with_the_updates_of_the_trainer_and_resumes_to_the_same_bits"),
        ("runs", f"{ENCODERS}the_cross_encoder_example_learns_with_and_without_rdrop"),
    ),
    "PyTorch-Ignite": of_another_trainer(
        (BATCH_MEANS, f"{OTHER}an_accumulated_update_of_ignite_is_that_of_the_mean_of_its_batches"),
        ("to the bit", f"{OTHER}ignite_resumes_to_the_same_bits"),
    ),
    "skorch": of_another_trainer(
        (
            "not possible",
            f"{OTHER}accumulation_of_skorch_by_accelerate_loses_all_batches_but_the_last_without_rdrop_too",
        ),
        ("to the bit", f"{OTHER}skorch_resumes_to_the_same_bits"),
    ),
    "fastai": of_another_trainer(
        ("exact", f"{OTHER}an_accumulated_update_of_fastai_is_that_of_all_its_examples"),
        ("to the bit", f"{OTHER}fastai_resumes_to_the_same_bits"),
    ),
    "Keras 3 on torch": (
        ("exact", f"{OTHER}an_update_of_keras_is_that_of_the_gradient_written_out"),
        (BATCH_MEANS, f"{OTHER}an_accumulated_update_of_keras_is_that_of_the_mean_of_its_batches"),
        NONE,
        ("to the bit", f"{OTHER}at_alpha_zero_keras_trains_as_without_rdrop_to_the_bit"),
        ("the library's", f"{OTHER}keras_evaluates_with_one_pass_and_no_dropout"),
        ("to the bit", f"{OTHER}keras_resumes_to_the_same_bits"),
        ("runs", f"{OTHER}the_example_of_another_trainer_learns"),
    ),
}


def tables() -> str:
    lines = [f"| library | {' | '.join(COLUMNS)} |", f"|---{'|---' * len(COLUMNS)}|"]
    lines += [f"| {library} | {' | '.join(seen for seen, _ in cells)} |" for library, cells in SUPPORT.items()]
    lines += ["", "The tests, in `tests/integrations/`:", "", "| library | column | test |", "|---|---|---|"]
    for library, cells in SUPPORT.items():
        behind: dict[str, list[str]] = {}
        for column, (_, test) in zip(COLUMNS, cells, strict=True):
            behind.setdefault(test, []).append(column)
        lines += [f"| {library} | {', '.join(names)} | `{test}` |" for test, names in behind.items() if test]
    return "\n".join(lines)


def rewritten(page: str) -> str:
    before, rest = page.split("<!-- support -->")
    _, after = rest.split("<!-- /support -->")
    return f"{before}<!-- support -->\n\n{tables()}\n\n<!-- /support -->{after}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
