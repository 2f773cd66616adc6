"""`BradleyTerryTrainer` pushes to the Hub through its publisher, and not at all without one."""

import pytest
from datasets import Dataset
from trl import RewardTrainer

from hf_rlhf_ext import publishing
from hf_rlhf_ext.data.schema import PreferenceDataError
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer
from tests.reward.examples import comparisons


class Journal:
    """A publisher that records its calls."""

    def __init__(self):
        self.calls = []

    def check_access(self, trainer, *, token=None, private=None):
        self.calls.append(("check_access", token, private))
        return "alice/reward"

    def push_checkpoint(self, trainer, folder):
        self.calls.append(("push_checkpoint", str(folder).rsplit("/", 1)[-1]))

    def push_run(self, trainer, message=None, **options):
        self.calls.append(("push_run", message, options))
        return "https://commit"

    def write_report(self, trainer, folder):
        self.calls.append(("write_report", str(folder)))

    def write_card(self, trainer, **options):
        self.calls.append(("write_card", options))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def set_publisher():
    """Sets the factory of publishers for one test."""
    factory = publishing._factory
    yield publishing.set_publisher
    publishing.set_publisher(factory)


def test_it_inherits_trls_trainer_alone():
    assert BradleyTerryTrainer.__bases__ == (RewardTrainer,)
    assert BradleyTerryTrainer.card_kind == "reward_model"


def test_access_is_checked_before_training_and_every_push_is_the_publishers(make_trainer, set_publisher, tmp_path):
    set_publisher(Journal)
    trainer = make_trainer(comparisons(4), push_to_hub=True, hub_strategy="every_save", max_steps=2, save_steps=2)
    journal = trainer.publisher
    assert journal.calls == [("check_access", None, None)] and trainer.hub_model_id == "alice/reward"
    trainer.train()
    assert ("push_checkpoint", "checkpoint-2") in journal.calls and journal.calls[-1] == ("finish",)
    assert trainer.push_to_hub("done", revision="v1", private=False) == "https://commit"
    options = {"blocking": True, "token": None, "revision": "v1", "private": False}
    assert journal.calls[-1] == ("push_run", "done", options)
    trainer.push_to_hub(blocking=False, tags=["polite"])
    assert journal.calls[-1][2] == dict.fromkeys(options) | {"blocking": False, "tags": ["polite"]}
    trainer.create_model_card("Judge", tags="polite")
    assert journal.calls[-1] == ("write_card", {"model_name": "Judge", "dataset_name": None, "tags": "polite"})
    trainer.save_model(str(tmp_path))  # which pushes too, as in Trainer
    assert [call[0] for call in journal.calls[-3:]] == ["finish", "push_run", "write_report"]
    assert journal.calls[-1] == ("write_report", str(tmp_path))
    assert make_trainer(comparisons(4), folder="other").publisher is not journal  # one trainer's alone


def test_without_a_publisher_a_push_is_refused_and_training_works(make_trainer, set_publisher):
    set_publisher(None)
    with pytest.raises(UserError, match="^push_to_hub: .*set_publisher.*hf-rlhf push"):
        make_trainer(comparisons(4), push_to_hub=True)
    trainer = make_trainer(comparisons(4), max_steps=1)
    trainer.train()
    with pytest.raises(UserError, match="^push_to_hub: "):
        trainer.push_to_hub()


def test_other_formats_go_through_load_comparisons(make_trainer):
    rows = [{"question": "Why?", "response_0": "a", "response_1": "b", "better_response_id": 0}]
    with pytest.raises(PreferenceDataError, match="^train: columns .*load_comparisons"):
        make_trainer(Dataset.from_list(rows))
