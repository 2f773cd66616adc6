"""The frozen reference is written once per run, and a checkpoint resumes with its own one, wherever it lies."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rlhf_ext.checkpointing import broken_file
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.run_files import LEFT_OUT, content_digest, run_files
from hf_rlhf_ext.modeling.stack import AdapterStack
from hf_rlhf_ext.ppo import reference_file
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.ranks import Ranks
from hf_rlhf_ext.ppo.reference_file import damage, digest_of, save_reference
from hf_rlhf_ext.ppo.trainer import PPOTrainer

ADAPTER = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
KINDS = ("whole", "sft")


@pytest.fixture(scope="module")
def make(chat_tokenizer_factory):
    """`make(folder, kind, seed)`: a trainer of three steps; `kind` is `whole`, `sft` (an adapter) or `base`."""
    tokenizer = chat_tokenizer_factory()
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    options = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
    options |= {"per_device_train_batch_size": 2, "num_mini_batches": 1, "num_ppo_epochs": 1, "save_steps": 1}
    options |= {"save_strategy": "steps", "max_completion_length": 3, "disable_tqdm": True, "critic": "head"}
    options |= {"max_steps": 2, "learning_rate": 1e-2}
    data = Dataset.from_list([{"prompt": "fox"}, {"prompt": "day"}])

    def make(folder, kind, seed=0, **changes):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        if kind == "sft":
            model = get_peft_model(model, ADAPTER)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (kind == "whole" and "mlp" in name):
                torch.nn.init.normal_(parameter, std=0.1)
        args = PPOConfig(str(folder), **(options | changes))
        rewards = [lambda completions, **_: [float(len(text)) for text in completions]]
        peft_config = ADAPTER if kind == "base" else None
        return PPOTrainer(model, rewards, args, data, processing_class=tokenizer, peft_config=peft_config)

    return make


@pytest.fixture(scope="module")
def runs(make, tmp_path_factory):
    """The folder of a run of each kind from seed 0, with the checkpoints 1 and 2, and the digest of its reference."""
    found = {}
    for kind in (*KINDS, "base"):
        trainer = make(tmp_path_factory.mktemp(kind), kind)
        digest = digest_of(trainer.stack)
        trainer.train()
        assert digest_of(trainer.stack) == digest
        found[kind] = (Path(trainer.args.output_dir), digest)
    return found


def sizes(folder):
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def references(folder):
    return sorted((folder / "ppo_reference").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_written_once_and_not_into_checkpoints(runs, kind):
    folder, digest = runs[kind]
    weights = {"whole": "model.safetensors", "sft": "adapter_model.safetensors"}[kind]
    (reference,) = references(folder)
    assert damage(reference, digest, reads_all=True) is None
    assert reference.name == digest[:16] and (reference / weights).is_file()
    for name in ("checkpoint-1", "checkpoint-2"):
        found = sizes(folder / name)
        assert [file for file in found if Path(file).name == weights] == [weights]
        state = json.loads((folder / name / "ppo_state.json").read_text())
        assert state["reference"] == {"digest": digest, "folder": f"ppo_reference/{reference.name}"}
    if kind == "whole":  # weights, and two moments of the optimizer: nothing else that is as large
        found = sizes(folder / "checkpoint-2")
        assert found.pop("model.safetensors") + found.pop("optimizer.pt") < 3.2 * (reference / weights).stat().st_size
        assert max(found.values()) < (reference / weights).stat().st_size


def test_a_base_without_an_adapter_needs_no_file(runs):
    folder, digest = runs["base"]
    assert digest is None and not (folder / "ppo_reference").exists()
    assert json.loads((folder / "checkpoint-2" / "ppo_state.json").read_text())["reference"] is None


def test_it_is_neither_pushed_nor_part_of_the_model(make, runs, tmp_path):
    folder = Path(shutil.copytree(runs["sft"][0], tmp_path / "run"))
    make(tmp_path / "none", "sft").save_model(str(folder))
    assert "ppo_*" in LEFT_OUT and not [name for name in run_files(folder, base_model="owner/base") if "/" in name]
    digest = content_digest(folder)
    shutil.rmtree(folder / "ppo_reference")
    assert content_digest(folder) == digest


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_checkpoint_alone_resumes_from_the_same_start_and_saves_the_reference_anew(make, runs, tmp_path, kind):
    folder, digest = runs[kind]
    checkpoint = shutil.copytree(folder / "checkpoint-1", tmp_path / "alone" / "checkpoint-1")
    trainer = make(tmp_path / "new", kind)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2
    (reference,) = references(tmp_path / "new")
    assert damage(reference, digest, reads_all=True) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["beside", "output_dir"])
def test_from_another_start_the_reference_of_the_run_is_read(make, runs, tmp_path, kind, place):
    folder, digest = runs[kind]
    run = tmp_path / "run"
    checkpoint = shutil.copytree(folder / "checkpoint-1", run / "checkpoint-1")
    new = tmp_path / "new"
    shutil.copytree(folder / "ppo_reference", {"beside": run, "output_dir": new}[place] / "ppo_reference")
    trainer = make(new, kind, seed=1)
    assert digest_of(trainer.stack) != digest
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert digest_of(trainer.stack) == digest
    assert damage(*references(new), digest, reads_all=True) is None


def break_weights(reference):
    path = next(reference.glob("*model.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the size stays the same
    path.write_bytes(content)


@pytest.mark.parametrize(
    "kind, harm, problem",
    [
        ("whole", lambda reference: shutil.rmtree(reference), "is missing"),
        ("sft", break_weights, "adapter_model.safetensors is missing or damaged"),
        ("whole", lambda reference: (reference / "content.json").unlink(), "content.json is missing or damaged"),
    ],
)
def test_a_reference_that_cannot_be_had_is_refused_in_one_line_before_anything_is_loaded(
    make, runs, tmp_path, kind, harm, problem
):
    run = Path(shutil.copytree(runs[kind][0], tmp_path / "run"))
    harm(*references(run))
    assert broken_file(run / "checkpoint-2") is None  # the same start needs no file
    trainer = make(tmp_path / "new", kind, seed=1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    own = digest_of(trainer.stack)
    with pytest.raises(
        UserError, match="resume_from_checkpoint: the reference of .*checkpoint-2 cannot be read"
    ) as error:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    line = str(error.value)
    assert problem in line and "give that model, or copy the run's folder ppo_reference/" in line and "\n" not in line
    assert digest_of(trainer.stack) == own
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    trainer.train()  # from the given weights instead
    assert [folder.name for folder in references(tmp_path / "new")] == [own[:16]]
    if kind == "whole":  # a file of another size is seen without reading it
        make(run, kind, max_steps=3).train(resume_from_checkpoint=True)
        assert damage(*references(run), runs[kind][1], reads_all=True) is None  # written again


@pytest.mark.parametrize("was, now", [("sft", "base"), ("base", "sft")])
def test_a_reference_of_another_kind_is_refused_in_one_line(make, runs, tmp_path, was, now):
    with pytest.raises(
        UserError, match="and with this model it is .*: give the model that the run began with"
    ) as error:
        make(tmp_path, now).train(resume_from_checkpoint=str(runs[was][0] / "checkpoint-1"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_an_earlier_version_has_it_inside(make, runs, tmp_path, kind):
    folder, digest = runs[kind]
    run = tmp_path / "run"
    checkpoint = Path(shutil.copytree(folder / "checkpoint-1", run / "checkpoint-1"))
    shutil.copytree(*references(folder), checkpoint / "ref")
    state = json.loads((checkpoint / "ppo_state.json").read_text())
    del state["reference"]
    (checkpoint / "ppo_state.json").write_text(json.dumps(state))
    trainer = make(run, kind, seed=1)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert digest_of(trainer.stack) == digest
    assert damage(*references(run), digest, reads_all=True) is None and not (run / "checkpoint-2" / "ref").exists()


def test_a_run_from_another_start_leaves_the_reference_that_older_checkpoints_need(make, tmp_path):
    first = make(tmp_path, "sft", max_steps=3)
    first.train()
    shutil.copytree(*references(tmp_path), tmp_path / "checkpoint-1" / "ref")  # as earlier versions did
    second = make(tmp_path, "sft", seed=1, max_steps=1)  # overwrites checkpoint-1
    second.train()
    digests = [digest_of(trainer.stack) for trainer in (first, second)]
    assert digests[0] != digests[1] and {path.name for path in references(tmp_path)} == {d[:16] for d in digests}
    assert not (tmp_path / "checkpoint-1" / "ref").exists()
    for step, digest in ((1, digests[1]), (2, digests[0])):
        third = make(tmp_path, "sft", seed=2, save_strategy="no", max_steps=3)
        third.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert digest_of(third.stack) == digest
    # Once rotation has removed the last checkpoint of the first run, nothing needs its reference.
    fourth = make(tmp_path, "sft", seed=1, save_total_limit=2, max_steps=4)
    fourth.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert [path.name for path in references(tmp_path)] == [digests[1][:16]]


def test_training_twice_in_one_process_keeps_the_reference(make, tmp_path):
    trainer = make(tmp_path, "whole")
    digest = digest_of(trainer.stack)
    trainer.train()
    written = (references(tmp_path)[0] / "model.safetensors").stat().st_mtime_ns
    trainer.train()
    assert digest_of(trainer.stack) == digest
    assert [path.name for path in references(tmp_path)] == [digest[:16]]
    assert (references(tmp_path)[0] / "model.safetensors").stat().st_mtime_ns == written


def test_a_run_that_is_killed_while_it_writes_leaves_no_half_of_it(make, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    save = AdapterStack.save

    def save_half(stack, role, folder, *args, **kwargs):
        save(stack, role, folder, *args, **kwargs)
        if role == "reference":
            break_weights(Path(folder))
            raise Killed

    monkeypatch.setattr(AdapterStack, "save", save_half)
    trainer = make(tmp_path, "sft")
    with pytest.raises(Killed):
        trainer.train()
    digest = digest_of(trainer.stack)
    assert damage(tmp_path / "ppo_reference" / digest[:16], digest) is not None
    assert broken_file(tmp_path / "checkpoint-1") is not None  # it is not complete without its reference
    monkeypatch.setattr(AdapterStack, "save", save)
    make(tmp_path, "sft").train()
    assert damage(*references(tmp_path), digest, reads_all=True) is None


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(make, tmp_path, monkeypatch):
    make(tmp_path, "sft", max_steps=1).train()

    def fails(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(reference_file, "_sha256", fails)  # after the weights, before their record
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path, "sft", seed=1).train()  # overwrites checkpoint-1
    monkeypatch.undo()
    (reference,) = (tmp_path / "ppo_reference").iterdir()
    assert damage(reference, digest_of(make(tmp_path, "sft").stack), reads_all=True) is None
    assert broken_file(tmp_path / "checkpoint-1") is not None
    make(tmp_path, "sft", seed=1, max_steps=1).train()
    # No checkpoint of the first run is left.
    assert [path.name for path in references(tmp_path)] == [digest_of(make(tmp_path, "sft", seed=1).stack)[:16]]


def test_of_several_processes_only_those_that_write_files_write(make, tmp_path):
    trainer = make(tmp_path / "run", "sft")
    ranks = Ranks(trainer.accelerator)
    digest = save_reference(trainer.stack, tmp_path / "checkpoint-1", None, ranks, writes=False)
    assert digest == digest_of(trainer.stack) and not (tmp_path / "ppo_reference").exists()
    assert save_reference(trainer.stack, tmp_path / "checkpoint-1", digest, ranks, writes=True) == digest
    assert damage(*references(tmp_path), digest, reads_all=True) is None
