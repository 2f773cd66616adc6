"""Start and end of a recipe with `--push_to_hub`: what is rejected before training, and what is kept for later runs."""

import json

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import save_file
from trl import SFTConfig

from hf_rlhf_ext.cli.finish import check_push, finish_run
from hf_rlhf_ext.cli.lineage import lineage_of
from hf_rlhf_ext.cli.options import DataArguments, ModelArguments
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.push import push_run


@pytest.fixture
def base(hub, tiny_llama, chat_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=tmp_path / "base")
    return "alice/base"


def config(folder, cls=SFTConfig, **options):
    return cls(output_dir=str(folder), use_cpu=True, bf16=False, push_to_hub=True, report_to=[], **options)


def test_what_the_hub_refuses_is_refused_before_training(base, hub, tmp_path):
    given = ModelArguments(model_name_or_path=base)
    for name, possible in (("my run (2)", "my-run-2"), ("alice/a--b", "a-b")):
        with pytest.raises(UserError, match=possible) as error:
            check_push(config(tmp_path / "x", hub_model_id=name), given)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="my-run"):  # the name of the folder is that of the repository
        check_push(config(tmp_path / "my  run"), given)
    assert {name for _, name in hub.repos} == {base}

    check_push(config(tmp_path / "x"), given, DataArguments(dataset_name="alice/prompts"))
    with pytest.raises(UserError, match="datasets"):  # in the header of the card
        check_push(config(tmp_path / "x"), given, DataArguments(dataset_name="alice/prompts/train"))


def test_a_public_adapter_on_a_private_base_is_said_before_training(base, hub, tmp_path, capsys):
    def said(**options):
        given = ModelArguments(model_name_or_path=base, use_peft=options.pop("use_peft", True))
        check_push(config(tmp_path / "x", **options), given)
        return capsys.readouterr().err

    assert said(hub_private_repo=False) == ""
    hub.repo(base).private = True
    (line,) = said(hub_private_repo=False).splitlines()
    assert line.startswith("warning: alice/x is public") and f"{base} is private" in line
    assert said() == said(hub_private_repo=False, use_peft=False) == ""  # who can read it has all of it


def mark(base, name):
    """Adds `auto_map` to a file of the base."""
    path = HfApi().hf_hub_download(base, name)
    content = json.dumps(json.loads(open(path).read()) | {"auto_map": {"AutoConfig": "configuration_x.XConfig"}})
    HfApi().upload_file(repo_id=base, path_in_repo=name, path_or_fileobj=content.encode())


def test_a_short_name_becomes_the_full_id(base, tmp_path):
    args = config(tmp_path / "polite")
    check_push(args, ModelArguments(model_name_or_path=base))
    assert args.hub_model_id == "alice/polite"


def test_code_that_would_not_be_published_is_refused_before_training(base, tmp_path):
    def check(use_peft=True, **options):
        check_push(config(tmp_path / "x", **options), ModelArguments(model_name_or_path=base, use_peft=use_peft))

    check()
    with pytest.raises(UserError, match="alice/base brings code of its own .*--allow") as error:
        check(trust_remote_code=True)
    assert "\n" not in str(error.value)
    mark(base, "config.json")
    check()  # the code is not pushed with an adapter
    with pytest.raises(UserError, match="brings code of its own"):
        check(use_peft=False)
    mark(base, "tokenizer_config.json")
    with pytest.raises(UserError, match="brings code of its own"):
        check()


def test_an_adapter_of_a_local_base_is_refused_whatever_use_peft_says(hub, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "sft").mkdir()
    adapter = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(adapter))
    for use_peft in (True, False):
        given = ModelArguments(model_name_or_path=str(tmp_path / "sft"), use_peft=use_peft)
        with pytest.raises(UserError, match="base is a local folder"):
            check_push(config(tmp_path / "x"), given)


class SecondProcess(SFTConfig):
    process_index = 1


def test_only_the_first_process_writes_and_pushes(hub, tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    card = {"base_model": "alice/base"}
    for cls, files in ((SecondProcess, set()), (SFTConfig, {"README.md", "report.json", "training_config.yaml"})):
        args = config(tmp_path, cls, hub_model_id="alice/x")
        report = finish_run(args, "sft", {"sft": {"loss": 1.0}}, (args,), seconds=1.0, card=card)
        assert report["sft"] == {"loss": 1.0} and report["seconds"] == {"sft": 1.0}
        assert files == {p.name for p in tmp_path.iterdir()} - {"model.safetensors", "pushed.json"}
        assert (("models", "alice/x") in hub.repos) is bool(files)


def test_a_rerun_has_all_options_and_the_card_those_of_the_training(hub, tmp_path):
    args = config(tmp_path, hub_model_id="alice/x", weight_decay=0.125, save_total_limit=3, logging_steps=7)
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    report = finish_run(args, "sft", {"sft": {"loss": 1.0}}, (args,), seconds=1.0, card={"base_model": "alice/base"})
    rerun = yaml.safe_load((tmp_path / "training_config.yaml").read_text())
    assert rerun["save_total_limit"] == 3 and rerun["logging_steps"] == 7
    assert yaml.safe_load(report["card"]["config"]) == {"weight_decay": 0.125}


def test_weights_that_were_trained_on_are_not_those_that_were_pushed(hub, tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    before = lineage_of(str(folder))
    push_run(folder)
    commit = hub.repo("alice/sft").at("main").oid
    assert lineage_of(str(folder)) == f"alice/sft@{commit}"
    (folder / "checkpoint-2").mkdir()
    save_file({"w": torch.ones(3)}, folder / "checkpoint-2" / "model.safetensors")
    assert lineage_of(str(folder)) == f"alice/sft@{commit}"
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    assert before.startswith("local sft (sha256 ") and lineage_of(str(folder)).startswith("local sft (sha256 ")
    assert lineage_of(str(folder)) != before
