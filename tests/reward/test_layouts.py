"""Training in the layouts: by segments it learns what plain rows learn; where a mask is needed, the cheaper is used."""

import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForSequenceClassification, PreTrainedModel

from hf_rlhf_ext.data.collators import DataCollatorForComparisons
from hf_rlhf_ext.modeling.adapters import bare_model
from hf_rlhf_ext.modeling.layouts import Layout, find_layout
from hf_rlhf_ext.reward.even_batches import micro_batches_of
from hf_rlhf_ext.reward.scores import score_batch
from tests.reward.examples import comparisons, trainable

LOAD_WITHOUT_US = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification
folder, ids = json.load(sys.stdin)
model = AutoModelForSequenceClassification.from_pretrained(folder)
assert not any(name.startswith("hf_rlhf_ext") for name in sys.modules)
with torch.no_grad():
    print(json.dumps([model.config._attn_implementation, model(torch.tensor([ids])).logits.item()]))
"""


def attention(model):
    return bare_model(model).config._attn_implementation


def shared_prompt(n, *, prompt, k, length):
    """Comparisons of `k` completions of `length` words each, after a prompt of `prompt` words."""
    texts = [" ".join(["day"] * length) + f" {number}" for number in range(k)]
    row = {"prompt": " ".join(["garden"] * prompt), "completions": texts, "pairs": [[0, 1]], "targets": [1.0]}
    return Dataset.from_list([row | {"weights": [1.0]}] * n)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "batches",
    [
        {},
        {"pad_to_multiple_of": 16},
        {"max_tokens_per_batch": 60},
        {"max_tokens_per_batch": 60, "pad_to_multiple_of": 16},
        {"max_tokens_per_batch": 1},
    ],
    ids=["one batch", "multiple of 16", "60 tokens", "60 tokens, multiple of 16", "one prompt at a time"],
)
def test_segments_give_loss_and_gradients_of_plain_rows(make_trainer, batches, checkpointing):
    """K is ragged. In the layout with segments, all prompts of a micro-batch are one row."""

    def loss_and_gradients(layout):
        torch.manual_seed(0)
        options = {"layout": layout, "activation_checkpointing": checkpointing, "normalize_rewards": False} | batches
        trainer = make_trainer(comparisons(9), folder=f"out-{layout}", **options)
        inputs = trainer.data_collator(list(trainer.train_dataset))
        parts = micro_batches_of(inputs)
        total = sum(part["weights"].sum() for part in parts)
        loss = torch.tensor(0.0)
        for part in parts:
            one = trainer.compute_loss(trainer.model, part, num_items_in_batch=total)
            one.backward()
            loss += one.detach()
        return trainer, parts, loss, {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}

    trainer, parts, loss, gradients = loss_and_gradients("auto")
    plain_trainer, _, expected, expected_gradients = loss_and_gradients("plain")
    assert trainer.layout == "shared_prefix" and attention(trainer.model) == "segments"
    assert plain_trainer.layout == "plain" and attention(plain_trainer.model) == "sdpa"
    assert all(len(part["input_ids"]) == 1 for part in parts)
    limit, multiple = batches.get("max_tokens_per_batch", 10**6), batches.get("pad_to_multiple_of", 1)
    for part in parts:
        width = part["input_ids"].shape[1]
        assert width % multiple == 0 and (width <= limit or len(part["completion_counts"]) == 1)
        assert width - part["token_counts"].sum() < multiple, "nothing is padded between prompts"
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_without_a_prompt_are_sequences_of_their_own(make_trainer):
    rows = [{"prompt_ids": [], "completion_ids": [[5, 6], [7, 8, 9]]}, {"prompt_ids": [5, 6], "completion_ids": [[7]]}]
    rows = [row | {"pairs": [], "targets": [], "weights": []} for row in rows]
    trainer = make_trainer(comparisons(2))
    collated = [
        DataCollatorForComparisons(0, layout="shared_prefix", one_row=one_row)(rows) for one_row in (True, False)
    ]
    with torch.no_grad():
        expected = score_batch(trainer.model, DataCollatorForComparisons(0, layout="plain")(rows))
        for batch in collated:
            for layout in (Layout.SEGMENTS, Layout.MASK):
                found = score_batch(trainer.model, batch, layout=layout)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# --- models that need a mask ------------------------------------------------------------------------------------------


@pytest.fixture
def eager(tiny_config):
    """A model whose attention is not sdpa, so that it needs a mask over the whole row."""
    tiny_config.num_labels = 1
    tiny_config._attn_implementation = "eager"
    return LlamaForSequenceClassification(tiny_config)


@pytest.mark.parametrize(
    "shape, layout",
    [({"prompt": 2, "k": 12, "length": 20}, "plain"), ({"prompt": 60, "k": 4, "length": 2}, "shared_prefix")],
)
def test_auto_takes_the_cheaper_layout_where_a_mask_is_needed(make_trainer, eager, caplog, shape, layout):
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(shared_prompt(4, **shape), model=eager, peft=None, normalize_rewards=False)
    assert trainer.layout == trainer.data_collator.layout == layout
    assert not trainer.data_collator.one_row and attention(trainer.model) == "eager"
    (said,) = [record.getMessage() for record in caplog.records if "times as long as plain rows" in record.getMessage()]
    assert ("plain rows are used" in said) == (layout == "plain")


def test_a_mask_that_costs_more_is_used_if_it_is_asked_for(make_trainer, eager):
    data = shared_prompt(4, prompt=2, k=12, length=20)
    trainer = make_trainer(data, model=eager, peft=None, layout="shared_prefix", normalize_rewards=False)
    assert trainer.layout == "shared_prefix" and not trainer.data_collator.one_row


def test_a_collator_of_the_user_is_kept(make_trainer, eager, chat_tokenizer, tmp_path):
    own = DataCollatorForComparisons(chat_tokenizer.pad_token_id, layout="plain")
    trainer = make_trainer(shared_prompt(4, prompt=60, k=4, length=2), model=eager, peft=None)
    again = type(trainer)(
        copy.deepcopy(eager), trainer.args, comparisons(4), processing_class=chat_tokenizer, data_collator=own
    )
    assert again.data_collator is own


def test_virtual_tokens_are_plain_rows_and_leave_the_attention_alone(make_trainer, caplog):
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(comparisons(4), peft=config)
    assert trainer.layout == "plain" and attention(trainer.model) == "sdpa"
    assert "virtual tokens" in caplog.text


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_saved_models_do_not_name_the_attention_of_training(make_trainer, tmp_path, monkeypatch):
    """They load and score the same with Transformers alone, and so does a trainer that resumes from a checkpoint."""
    trainer = make_trainer(comparisons(8), peft=None, max_steps=2, save_steps=1, normalize_rewards=False)
    trainer.train()
    trainer.save_model()
    assert attention(trainer.model) == "segments"
    folder = tmp_path / "out"
    for file in folder.rglob("*.json"):
        assert "segments" not in file.read_text(encoding="utf-8"), file
    assert "segments" not in trainer.model.config.to_json_string()
    ids = [5, 6, 7, 8, 9]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_US],
        input=json.dumps([str(folder), ids]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    name, score = json.loads(done.stdout)
    with torch.no_grad():
        assert name == "sdpa" and score == trainer.model(torch.tensor([ids])).logits.item()


def test_an_evaluation_while_training_is_that_of_plain_rows(make_trainer):
    def metrics(layout):
        torch.manual_seed(0)
        trainer = make_trainer(comparisons(6), layout=layout, folder=layout, normalize_rewards=False)
        prediction = trainer.predict(comparisons(7, seed=9))
        return trainer, prediction.predictions, prediction.metrics

    trainer, scores, found = metrics("auto")
    _, expected_scores, expected = metrics("plain")
    assert trainer.layout == "shared_prefix"
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected_scores), rtol=0, atol=1e-5)
    for name in ("test_loss", "test_accuracy", "test_mean_reward"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5), name


# --- memory -----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation returns, in elements."""

    def __init__(self):
        super().__init__()
        self.n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, list | tuple) else [output]:
            if isinstance(value, torch.Tensor):
                self.n_elements = max(self.n_elements, value.untyped_storage().nbytes() // value.element_size())
        return output


def largest_tensor(model: PreTrainedModel, layout: Layout, k: int) -> int:
    row = {
        "prompt_ids": [5] * 16,
        "completion_ids": [[6] * 24] * k,
        "pairs": [[0, 1]],
        "targets": [1.0],
        "weights": [1.0],
    }
    batch = DataCollatorForComparisons(0, layout="shared_prefix", one_row=layout == Layout.SEGMENTS)([row])
    with LargestTensor() as largest:
        score_batch(model, batch, layout=layout).sum().backward()
    return largest.n_elements


def test_no_tensor_grows_with_the_square_of_the_completions(seqcls):
    """From 8 to 64 completions of 24 tokens, the largest tensor grows 8 times; with a mask, nearly 64 times."""
    assert find_layout(seqcls).layout == Layout.SEGMENTS
    assert largest_tensor(seqcls, Layout.SEGMENTS, 64) <= 8.5 * largest_tensor(seqcls, Layout.SEGMENTS, 8)
    assert largest_tensor(seqcls, Layout.MASK, 64) > 30 * largest_tensor(seqcls, Layout.MASK, 8)


def test_training_by_segments_resumes_to_the_bit(make_trainer, tiny_config):
    def run(resume=None, **options):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(tiny_config)
        trainer = make_trainer(
            comparisons(11), model=model, save_steps=2, max_steps=4, max_tokens_per_batch=60, normalize_rewards=False,
            **options,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        assert attention(trainer.model) == "segments"
        return trainable(trainer.model), trainer.args.output_dir

    whole, folder = run(folder="whole")
    resumed, _ = run(resume=f"{folder}/checkpoint-2", folder="resumed")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
