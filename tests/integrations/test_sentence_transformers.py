"""R-Drop in the losses of cross-encoders: exact, plain at alpha 0 and in evaluation, refused without dropout."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("sentence_transformers", reason="an extra: pip install '.[sentence-transformers]'")

from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, CrossEntropyLoss

from rdrop import rdrop_loss
from rdrop.integrations.sentence_transformers import RDropBinaryCrossEntropyLoss, RDropCrossEntropyLoss

EXAMPLE = Path(__file__).parents[2] / "examples" / "cross_encoder.py"
PAIRS = [["two", "four", "ten", "one"], ["one", "six", "two", "two"]]
ALPHA = 50.0
LOSSES = {
    "one label": (1, BinaryCrossEntropyLoss, RDropBinaryCrossEntropyLoss, torch.tensor([1.0, 0.0, 1.0, 0.2])),
    "three labels": (3, CrossEntropyLoss, RDropCrossEntropyLoss, torch.tensor([0, 2, 1, 1])),
}
losses = pytest.mark.parametrize("case", LOSSES)


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE), run_name="example")


@pytest.fixture
def make_model(example: dict[str, Any], tmp_path: Path) -> Any:
    """Returns equal models, of BERT's dropout of 0.1."""

    def make(num_labels: int) -> CrossEncoder:
        folder = tmp_path / str(num_labels)
        if not folder.exists():
            folder.mkdir()
            example["new_model"](folder, num_labels)
        model = CrossEncoder(str(folder))
        torch.manual_seed(0)
        for parameter in model.parameters():  # as drawn, the passes hardly differ
            parameter.data += torch.randn_like(parameter) * 0.3
        return model

    return make


def with_gradient(loss: Any, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    value = loss(PAIRS, labels)
    value.backward()
    return value.detach(), [p.grad for p in loss.model.parameters() if p.grad is not None]


@losses
def test_the_loss_and_its_gradient_are_those_written_out(make_model: Any, case: str) -> None:
    num_labels, _, rdrop_class, labels = LOSSES[case]
    own = rdrop_class(make_model(num_labels).train(), alpha=ALPHA)
    value, gradients = with_gradient(own, labels)
    model = make_model(num_labels).train()
    torch.manual_seed(1)
    scores = model(model.preprocess(list(zip(*PAIRS, strict=True)) * 2))["scores"]
    if num_labels == 1:
        scores = scores.view(-1)
        task_loss = F.binary_cross_entropy_with_logits(scores, labels.repeat(2))
        logs = torch.stack([F.logsigmoid(scores), F.logsigmoid(-scores)], -1)
    else:
        task_loss, logs = F.cross_entropy(scores, labels.repeat(2)), scores.log_softmax(-1)
    p, q = logs.chunk(2)
    divergence = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    assert ALPHA / 2 * divergence > 0.1 * task_loss
    loss = task_loss + ALPHA / 2 * divergence
    loss.backward()
    torch.testing.assert_close(value, loss.detach())
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


def test_an_accumulated_update_is_that_of_the_mean_of_its_batches(make_model: Any, tmp_path: Path) -> None:
    """Two batches of two pairs, by the trainer; its one step is of SGD with rate 1."""
    rows = [{"query": q, "number": n, "label": y} for q, n, y in zip(*PAIRS, [0, 2, 1, 1], strict=True)]
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "max_grad_norm": 0}
    trained, model = make_model(3), make_model(3).train()
    seen: list[Any] = []

    class Seeded(RDropCrossEntropyLoss):  # the same masks in every batch
        def forward(self, inputs: Any, labels: Tensor, **options: Any) -> Tensor:
            torch.manual_seed(1)
            seen.append((inputs, labels))
            return super().forward(inputs, labels, **options)

    CrossEncoderTrainer(
        model=trained,
        args=CrossEncoderTrainingArguments(str(tmp_path), learning_rate=1.0, **settings, **quiet),
        train_dataset=Dataset.from_list(rows),
        loss=Seeded(trained, alpha=ALPHA),
    ).train()
    for batch in seen[:2]:
        (Seeded(model, alpha=ALPHA)(*batch) / 2).backward()
    for found, before in zip(trained.parameters(), model.parameters(), strict=True):
        gradient = torch.zeros_like(before) if before.grad is None else before.grad
        torch.testing.assert_close(found, before - gradient, rtol=1e-3, atol=1e-5)


@losses
def test_at_alpha_zero_it_is_the_loss_of_the_library_to_the_bit(make_model: Any, case: str) -> None:
    num_labels, plain_class, rdrop_class, labels = LOSSES[case]
    value, gradients = with_gradient(rdrop_class(make_model(num_labels).train(), alpha=0.0), labels)
    expected, expected_gradients = with_gradient(plain_class(make_model(num_labels).train()), labels)
    assert torch.equal(value, expected)
    assert all(map(torch.equal, gradients, expected_gradients))


@losses
def test_in_evaluation_it_is_the_loss_of_the_library_to_the_bit(make_model: Any, case: str) -> None:
    num_labels, plain_class, rdrop_class, labels = LOSSES[case]
    model = make_model(num_labels).eval()
    assert torch.equal(rdrop_class(model, alpha=ALPHA)(PAIRS, labels), plain_class(model)(PAIRS, labels))


def test_the_options_of_the_libraries_losses_act_on_the_task_loss(make_model: Any) -> None:
    """With a tiny alpha the value is that of the library's loss of the repeated pairs."""
    twice = [column * 2 for column in PAIRS]
    for num_labels, options in ((1, {"pos_weight": torch.tensor(3.0)}), (3, {"label_smoothing": 0.2})):
        _, plain_class, rdrop_class, labels = LOSSES["one label" if num_labels == 1 else "three labels"]
        model = make_model(num_labels).train()
        torch.manual_seed(1)
        value = rdrop_class(model, alpha=1e-9, **options)(PAIRS, labels)
        torch.manual_seed(1)
        torch.testing.assert_close(value, plain_class(model, **options)(twice, labels.repeat(2)))


def test_class_weights_of_a_loss_go_where_it_goes_and_are_loaded_with_it(make_model: Any) -> None:
    weight = torch.tensor([100.0, 1.0, 1.0])
    loss = RDropCrossEntropyLoss(make_model(3).train(), alpha=1.0, weight=torch.ones(3)).double()
    criterion = loss.ce_loss
    criterion.load_state_dict({"plain.weight": weight})
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 0, 2])
    expected = rdrop_loss(logits, labels[:2], alpha=1.0, weight=weight).loss
    assert criterion(logits, labels).item() == pytest.approx(expected.item())
    assert criterion.to("meta")(logits.to("meta"), labels.to("meta")).device.type == "meta"


def test_what_cannot_be_regularized_is_refused(make_model: Any) -> None:
    model = make_model(3).train()
    with pytest.raises(ValueError, match=r"passes \(=1\) must be 2 or more"):
        RDropCrossEntropyLoss(model, alpha=1.0, passes=1)
    with pytest.raises(ValueError, match="reduction='sum': only the mean"):
        RDropCrossEntropyLoss(model, alpha=1.0, reduction="sum")
    with pytest.raises(ValueError, match="a weight per pair of one batch"):
        RDropBinaryCrossEntropyLoss(make_model(1), alpha=1.0, weight=torch.ones(4))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with pytest.raises(ValueError, match="nothing is random in CrossEncoder while it trains"):
        RDropCrossEntropyLoss(model, alpha=1.0)(PAIRS, torch.tensor([0, 2, 1, 1]))


def test_the_trainer_evaluates_as_with_the_loss_of_the_library(make_model: Any, tmp_path: Path) -> None:
    rows = [{"query": q, "number": n, "label": y} for q, n, y in zip(*PAIRS, [1.0, 0.0, 1.0, 0.0], strict=True)]
    data = Dataset.from_list(rows)
    scores = []
    for loss_class, options in ((BinaryCrossEntropyLoss, {}), (RDropBinaryCrossEntropyLoss, {"alpha": ALPHA})):
        model = make_model(1)
        arguments = CrossEncoderTrainingArguments(
            str(tmp_path / "out"), use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False
        )
        loss = loss_class(model, **options)
        trainer = CrossEncoderTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss)
        scores.append(trainer.evaluate()["eval_loss"])
    assert scores[0] == scores[1]


def trained(make_model: Any, folder: Path, resume: bool = False, tell: bool = True, **method: Any) -> Any:
    """The trainer after four updates of two accumulated batches each, with every alpha in its loss's `seen`."""
    rows = [{"query": q, "number": n, "label": y} for q, n, y in zip(*PAIRS, [0, 2, 1, 1], strict=True)]
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    model = make_model(3)
    loss = RDropCrossEntropyLoss(model, **method)
    terms, seen = loss.ce_loss.terms, []

    def watched(*arguments: Any, alpha: float) -> Any:
        seen.append(alpha)
        return terms(*arguments, alpha=alpha)

    loss.ce_loss.terms = watched
    trainer = CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(str(folder), **(settings | quiet)),
        train_dataset=Dataset.from_list(rows),
        loss=loss,
        callbacks=[loss.schedule] if tell else [],
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    trainer.seen = seen
    return trainer


def test_alpha_rises_with_the_updates_of_the_trainer_and_resumes_to_the_same_bits(
    make_model: Any, tmp_path: Path
) -> None:
    whole = trained(make_model, tmp_path / "out", alpha=2.0, alpha_schedule="quadratic")
    assert whole.seen == [0.125, 0.125, 0.5, 0.5, 1.125, 1.125, 2.0, 2.0]
    resumed = trained(make_model, tmp_path / "out", resume=True, alpha=2.0, alpha_schedule="quadratic")
    assert resumed.seen == whole.seen[4:]
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    assert trained(make_model, tmp_path / "auto", alpha="auto").seen[-1] == 4.0


def test_an_alpha_that_rises_wants_to_be_told_the_update(make_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pass callbacks=\[loss\.schedule\] to CrossEncoderTrainer"):
        trained(make_model, tmp_path, tell=False, alpha=2.0, alpha_schedule="linear")
    assert trained(make_model, tmp_path, tell=False, alpha=2.0).seen == [2.0] * 8
    with pytest.raises(ValueError, match=r"alpha_schedule \(='linear'\) must be left out with alpha='auto'"):
        RDropCrossEntropyLoss(make_model(3), alpha="auto", alpha_schedule="linear")
    with pytest.raises(ValueError, match="must be 'constant', 'linear' or 'quadratic'"):
        RDropCrossEntropyLoss(make_model(3), alpha=1.0, alpha_schedule="cosine")


@losses
def test_the_model_card_states_the_settings(make_model: Any, case: str, tmp_path: Path) -> None:
    num_labels, _, rdrop_class, labels = LOSSES[case]
    rows = [{"query": q, "number": n, "label": y} for q, n, y in zip(*PAIRS, labels.tolist(), strict=True)]
    model = make_model(num_labels)
    CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], dataloader_pin_memory=False),
        train_dataset=Dataset.from_list(rows),
        loss=rdrop_class(model, alpha="auto", passes=3),
    )
    model.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert rdrop_class.__name__ in card
    for line in ('"alpha": 4.0', '"alpha_schedule": "quadratic"', '"passes": 3'):
        assert line in card


def test_the_cross_encoder_example_learns_with_and_without_rdrop(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    scores = re.findall(r"alpha (\d): accuracy on the pairs (\d\.\d+)", capsys.readouterr().out)
    assert [alpha for alpha, _ in scores] == ["0", "1"]
    assert min(float(score) for _, score in scores) > 0.8  # chance is 0.5
