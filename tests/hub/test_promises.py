"""`push_to_hub` and `create_model_card` of every trainer mean what they mean in Trainer and TRL, or are refused."""

import json
from concurrent.futures import Future

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer, load_base_model, push_run
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.asked_card import AskedCard
from hf_rlhf_ext.hub.report import CardOptions, RunReport
from hf_rlhf_ext.hub.sft import PublishingSFTTrainer
from hf_rlhf_ext.hub.visibility import base_state, warn_private_base
from tests.hub.conftest import ALICE, BOB

KINDS = ("sft", "reward_model", "policy")
PAIRS = [{"prompt": f"Day {i}?", "chosen": "Sunny!", "rejected": "No."} for i in range(4)]


@pytest.fixture
def base(hub, tiny_llama, chat_tokenizer, tmp_path):
    """A base on the Hub."""
    for part in (tiny_llama, chat_tokenizer):
        part.save_pretrained(tmp_path / "base")
    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=tmp_path / "base")
    return "alice/base"


@pytest.fixture
def make_trainer(base, chat_tokenizer, tmp_path):
    """Makes a trainer of each kind with a new adapter on the base."""

    def make(kind, **options):
        defaults = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
        options = defaults | {"per_device_train_batch_size": 2, "disable_tqdm": True} | options
        folder = str(tmp_path / "polite")
        task = "SEQ_CLS" if kind == "reward_model" else "CAUSAL_LM"
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type=task)
        given = {"processing_class": chat_tokenizer, "peft_config": lora}
        model = load_base_model(base, task="reward" if kind == "reward_model" else "causal_lm", dtype="float32")
        if kind == "sft":
            rows = Dataset.from_dict({"prompt": ["Tell me"] * 2, "completion": [" a sunny day"] * 2})
            return PublishingSFTTrainer(model, args=SFTConfig(folder, **options), train_dataset=rows, **given)
        if kind == "reward_model":
            args = BradleyTerryConfig(folder, normalize_rewards=False, **options)
            return BradleyTerryTrainer(model, args=args, train_dataset=Dataset.from_list(PAIRS), **given)
        rows = Dataset.from_dict({"prompt": ["Tell me", "a sunny day"]})
        args = PPOConfig(folder, max_completion_length=4, num_mini_batches=1, critic="head", **options)
        return PPOTrainer(model, lambda completions, **_: [1.0 for _ in completions], args, rows, **given)

    return make


def page(hub, repo="alice/polite", **options):
    return hub.files(repo, **options)["README.md"].decode()


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


class Pushes(TrainerCallback):
    """Counts the pushes that callbacks are told of."""

    count = 0

    def on_push_begin(self, args, state, control, **kwargs):
        self.count += 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_a_push_is_in_the_card(hub, make_trainer, kind, tmp_path):
    trainer = make_trainer(kind)
    trainer.model.add_model_tags(["of-the-model"])
    callback = Pushes()
    trainer.add_callback(callback)
    asked = {"model_name": "Polite one", "tags": "poetry", "language": "en", "license": "mit"}
    asked |= {"dataset_name": "alice/rows", "dataset_tags": ["acme/other"], "dataset": "Other rows"}
    trainer.push_to_hub("Mine", token=ALICE, private=False, dataset_args="easy", **asked)
    text = page(hub)
    found = header(text)
    assert "# Polite one" in text and "Other rows" in text and "easy" in text
    assert {"poetry", "of-the-model"} <= set(found["tags"]) and len(set(found["tags"])) == len(found["tags"])
    assert found["license"] == "mit" and found["language"] in ("en", ["en"])
    assert found["datasets"] == ["alice/rows", "acme/other"] and found["base_model"] == "alice/base"
    assert hub.repo("alice/polite").history()[0].title == "Mine" and not hub.repo("alice/polite").private
    assert callback.count == 1
    push_run(tmp_path / "polite", "alice/later")  # the report keeps them
    assert "# Polite one" in page(hub, "alice/later") and header(page(hub, "alice/later"))["license"] == "mit"
    with pytest.raises(UserError, match="no option 'dataset_names': did you mean dataset_name"):
        trainer.push_to_hub(dataset_names="x")
    with pytest.raises(UserError, match="finetuned_from: the base of this adapter is alice/base"):
        trainer.push_to_hub(finetuned_from="alice/x")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_card_is_ours_and_a_saved_model_has_what_a_later_push_needs(hub, make_trainer, kind, tmp_path):
    trainer = make_trainer(kind, save_strategy="steps", save_steps=1)
    folder = tmp_path / "polite"
    trainer.train()
    checkpoint = folder / "checkpoint-1"
    assert not (folder / "README.md").exists()  # the weights are in the checkpoint
    assert not (checkpoint / "report.json").exists() and (checkpoint / "adapter_config.json").exists()
    trainer.create_model_card("Polite one", "alice/rows", tags=["poetry"], license="mit")
    card = (folder / "README.md").read_text()
    assert "# Polite one" in card and "hf_rlhf_ext" in header(card)["tags"] and "generated_from_trainer" not in card
    (folder / "README.md").write_text(card + "\n## Contact\n\nAsk.\n")
    trainer.save_model()  # by PEFT, which would change the card
    assert json.loads((folder / "report.json").read_text())["card"]["tags"][-1:]
    push_run(folder)
    text = page(hub)
    assert "# Polite one" in text and text.endswith("## Contact\n\nAsk.\n") and header(text)["license"] == "mit"
    assert header(text)["datasets"] == ["alice/rows"] and "poetry" in header(text)["tags"]
    assert header(text)["base_model"] == "alice/base"


@pytest.mark.slow
def test_a_push_in_the_background_is_a_future_of_the_url(hub, make_trainer):
    trainer = make_trainer("sft")
    hub.fault(503, match="/commit/", headers={"Retry-After": "0"})
    push = trainer.push_to_hub(blocking=False, revision="v1")
    assert isinstance(push, Future) and not push.done()
    trainer.save_model()  # waits, as the push reads the same files
    assert push.done() and push.result().startswith(f"{hub.url}/alice/polite/commit/")
    assert "README.md" in hub.files("alice/polite", revision="v1")


@pytest.mark.slow
def test_a_report_that_cannot_be_written_does_not_stop_the_save(make_trainer, tmp_path, capsys):
    trainer = make_trainer("sft")
    trainer.save_model()
    report = tmp_path / "polite" / "report.json"
    report.unlink()
    report.mkdir()
    trainer.save_model()
    assert "report.json was not written" in capsys.readouterr().err


@pytest.mark.slow
def test_text_on_the_hub_stays_when_a_checkpoint_is_pushed(hub, make_trainer):
    trainer = make_trainer("sft", push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer.push_to_hub()
    edited = page(hub) + "\n## Contact\n\nAsk.\n"
    HfApi().upload_file(repo_id="alice/polite", path_or_fileobj=edited.encode(), path_in_repo="README.md")
    trainer.train()
    trainer._finish_current_push()
    text = page(hub)
    assert "## Contact" in text and "How it was made" not in text
    trainer.push_to_hub()
    assert "## Contact" in page(hub) and page(hub).count("How it was made") == 1


# What is asked for, without a trainer


@pytest.mark.parametrize(
    "options, message",
    [
        ({"license_nam": "mit"}, "no option 'license_nam': did you mean license_name"),
        ({"zzz": 1}, "no option 'zzz': use model_name, "),
        ({"license": "Apache 2.0"}, "license: .*apache-2.0"),
        ({"license": "other"}, "license: .*license_name"),
        ({"license_name": "mine"}, "license='other'"),
        ({"tags": 3}, "tags: got 3"),
        ({"model_name": ""}, "model_name: got ''"),
        ({"dataset_name": "my own rows"}, "dataset_name: 'my own rows' is no id .*dataset="),
        ({"dataset": ["a", "b"], "dataset_tags": "alice/a"}, "dataset: 2 names for 1 dataset_tags"),
        ({"dataset_args": "easy"}, "dataset_args: 1 for 0 datasets"),
        ({"language": "English"}, "language: 'English' .*such as en"),
        ({"tasks": "text-generation"}, "tasks: .*text-classification: leave tasks out"),
    ],
)
def test_what_cannot_be_said_is_refused_in_one_line(hub, options, message):
    with pytest.raises(UserError, match=message) as error:
        AskedCard.of_options(options, "reward_model")
    assert "\n" not in str(error.value)


def test_options_that_are_none_ask_for_nothing():
    assert AskedCard.of_options({"tags": None, "license": None, "tasks": "text-generation"}, "sft").names == []


def test_names_of_data_are_those_of_the_recorded_rows():
    recorded = [{"role": "comparisons", "name": "rows.jsonl", "rows": 9}, {"role": "evaluation", "rows": 2}]
    report = RunReport(card=CardOptions("reward_model", data=recorded, datasets=["a/b"], tags=["x"]))
    asked = AskedCard.of_options({"dataset_name": "alice/rows", "dataset_args": "easy", "tags": ["x", "y"]}, "sft")
    asked.written_into(report)
    assert report.card.data[0] == {"role": "comparisons", "name": "alice/rows", "rows": 9, "config": "easy"}
    assert report.card.datasets == ["a/b", "alice/rows"] and report.card.tags == ["x", "y"]
    asked.written_into(report)  # once more changes nothing
    assert len(report.card.data) == 2 and report.card.datasets == ["a/b", "alice/rows"]
    known = [{"role": "comparisons", "name": "acme/x", "revision": "v1"}]
    other = RunReport(card=CardOptions("reward_model", data=known))
    asked.written_into(other)
    assert [entry["name"] for entry in other.card.data] == ["acme/x", "alice/rows"]


def test_a_later_option_replaces_an_earlier_one_and_lists_grow():
    first = AskedCard.of_options({"tags": "a", "license": "other", "license_name": "mine"}, "sft")
    later = AskedCard.of_options({"tags": "b", "license": "mit"}, "sft").after(first)
    assert later.tags == ("a", "b") and (later.license, later.license_name) == ("mit", None)
    assert AskedCard().after(first) == first


# The base of a public adapter


def test_a_public_adapter_on_a_base_that_others_cannot_read_warns(hub, base, capsys):
    HfApi().create_repo("alice/hidden", private=True)
    assert [base_state(name) for name in ("alice/base", "alice/hidden", "alice/gone")] == [None, "private", "missing"]
    assert base_state("alice/hidden", BOB) == "missing"
    for name, reason in (("alice/hidden", "is private"), ("alice/gone", "is not on the Hub")):
        line = warn_private_base(name, False)
        assert reason in line and capsys.readouterr().err == f"{line}\n"
        assert warn_private_base(name, None) is None and warn_private_base(name, True) is None
    assert warn_private_base("alice/base", False) is None and warn_private_base(None, False) is None
    HfApi().create_repo("alice/open", private=False)  # exists, so what is asked for does not matter
    assert "alice/open is public" in warn_private_base("alice/hidden", True, repo_id="alice/open")


def test_a_push_of_a_public_adapter_says_it(hub, base, tmp_path, capsys):
    hub.repo(base).private = True
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    push_run(folder, "alice/open", private=False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "its base alice/base is private" in line
    push_run(folder, "alice/closed")
    assert "is private, so" not in capsys.readouterr().err
