"""Evaluation of the systems of a seed, on tiny real models."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rlhf_ext.data.text import encode_generation_prompt, plain_text
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.compare_parts.evaluation import RESULTS, EvaluationSetup, SeedEvaluator, evaluate
from hf_rlhf_ext.recipes.compare_parts.records import Clock, Snapshot, SystemRecord
from hf_rlhf_ext.recipes.rounds_parts.data import read_rows
from hf_rlhf_ext.study.judges import PairwiseJudge, ScoreJudge

N_PROMPTS = 5
TEMPERATURE = 0.8
POLICIES = {"sft": 1, "ppo": 2}
"""Seed of the random adapter of each policy."""


def vowels(prompts, completions, **columns):
    """The proxy: number of vowels."""
    return [float(sum(letter in "aeiou" for letter in plain_text(completion))) for completion in completions]


def consonants(prompts, completions):
    """The gold."""
    return [float(sum(letter in "bcdfghklmnprstw" for letter in completion)) for completion in completions]


def longer(prompts, first, second):
    """A judge that compares."""
    return [float(len(a) > len(b)) if len(a) != len(b) else 0.5 for a, b in zip(first, second, strict=True)]


@pytest.fixture(scope="module")
def made(tmp_path_factory, chat_tokenizer_factory, save_base):
    """A folder of a run with a base model and random adapters, before any evaluation."""
    folder = tmp_path_factory.mktemp("compare")
    base = str(save_base(folder / "base", chat_tokenizer_factory()))
    prompts = folder / "seed-0" / "data" / "prompts" / "heldout.jsonl"
    prompts.parent.mkdir(parents=True)
    rows = [
        {"prompt": [{"role": "user", "content": f"Tell me about day {k}."}], "category": "day"}
        for k in range(N_PROMPTS)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, seed in POLICIES.items():
        save_adapter(base, folder / "seed-0" / "systems" / name / "policy", seed)
    save_adapter(base, folder / "seed-0" / "systems" / "ppo" / "snapshots" / "0", 3)
    return folder, base


def save_adapter(base: str, folder: Path, seed: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


@pytest.fixture(scope="module")
def setup(made):
    folder, base = made
    judges = [ScoreJudge(consonants, "gold", tie=0.0), PairwiseJudge(longer, "judges.py:longer")]
    return EvaluationSetup(
        folder=folder,
        judges=judges,
        base_model=base,
        base_options={"dtype": "float32"},
        temperature=TEMPERATURE,
        max_completion_length=12,
        reward_model=None,
        proxy=vowels,
        clock="cpu",
    )


@pytest.fixture(scope="module")
def records(made):
    _, base = made
    snapshot = Snapshot(5, Clock(2.0, 1.0), "systems/ppo/snapshots/0")
    return [
        SystemRecord("base", "base", base),
        SystemRecord("sft", "sft", "systems/sft/policy"),
        SystemRecord("best_of_2", "best_of_n", "systems/sft/policy", n=2),
        SystemRecord("best_of_4", "best_of_n", "systems/sft/policy", n=4),
        SystemRecord("ppo", "ppo", "systems/ppo/policy", own=Clock(4.0, 3.0), snapshots=(snapshot,)),
    ]


@pytest.fixture(scope="module")
def results(setup, records):
    kinds = {"grpo": "grpo"} | {record.name: record.kind for record in records}
    failures = {"grpo": "it ran out of memory"}
    return evaluate(setup, 0, records, failures=failures, kinds=kinds, leaks={"heldout_left_out": 1})


def test_the_file_of_a_seed_has_what_was_measured(results, made, records):
    folder, _ = made
    assert json.loads((folder / "seed-0" / RESULTS).read_text()) == results
    assert list(results["systems"]) == ["grpo", *(record.name for record in records)]
    assert results["systems"]["grpo"] == {"status": "failed", "error": "it ran out of memory", "kind": "grpo"}
    for record in records:
        entry = results["systems"][record.name]
        assert entry["status"] == "ok", entry["error"]
        assert len(entry["kl"]) == len(entry["proxy"]) == len(entry["gold"]["gold"]) == N_PROMPTS
    assert len(results["prompt_ids"]) == N_PROMPTS
    assert results["categories"] == ["day"] * N_PROMPTS


def test_kl_is_the_difference_of_log_probabilities(results, made):
    """Against a forward pass of Transformers, one answer at a time."""
    folder, base = made
    assert results["systems"]["sft"]["kl"] == [0.0] * N_PROMPTS
    rows = read_rows(folder / "seed-0" / "completions" / "ppo.jsonl")
    for row, kl in zip(rows, results["systems"]["ppo"]["kl"], strict=True):
        assert row["kl"] == kl
    own = [sampled_logprob(folder, "ppo", k) for k in range(N_PROMPTS)]
    under_sft = [sampled_logprob(folder, "ppo", k, policy="sft") for k in range(N_PROMPTS)]
    expected = [first - second for first, second in zip(own, under_sft, strict=True)]
    assert results["systems"]["ppo"]["kl"] == pytest.approx(expected, abs=1e-3)
    assert max(abs(value) for value in expected) > 0.05  # else the test could not fail


def sampled_logprob(folder: Path, system: str, number: int, *, policy: str | None = None) -> float:
    """Log-probability of an answer at the temperature of sampling, with its stop token if it has one."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "seed-0" / "systems" / (policy or system) / "policy").eval()
    row = read_rows(folder / "seed-0" / "completions" / f"{system}.jsonl")[number]
    prompt = encode_generation_prompt(tokenizer, row["prompt"])
    answer = row["ids"]
    assert tokenizer.decode(answer, skip_special_tokens=True) == plain_text(row["completion"])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())


def test_best_of_n_is_measured_on_all_subsets_and_answers_with_its_first_n(results, made, setup):
    folder, _ = made
    (path,) = (folder / "seed-0" / "completions").glob("samples-*")
    evaluator_rows = read_rows(folder / "seed-0" / "completions" / "best_of_2.jsonl")
    samples = samples_in(path, made[1])
    entry = results["systems"]["best_of_2"]
    for k, texts in enumerate(samples):
        proxy = vowels(None, texts)
        gold = consonants(None, texts)
        assert plain_text(evaluator_rows[k]["completion"]) == max(texts[:2], key=lambda text: vowels(None, [text])[0])
        assert entry["answer_proxy"][k] == max(proxy[:2])
        best_gold = []
        for pair in combinations(range(4), 2):
            top = max(proxy[place] for place in pair)
            tied = [gold[place] for place in pair if proxy[place] == top]  # one of them at random
            best_gold.append(sum(tied) / len(tied))
        assert entry["gold"]["gold"][k] == pytest.approx(sum(best_gold) / len(best_gold))
        best_proxy = [max(proxy[place] for place in pair) for pair in combinations(range(4), 2)]
        assert entry["proxy"][k] == pytest.approx(sum(best_proxy) / len(best_proxy))
    assert entry["estimated_from"] == 4
    assert entry["alignment_tax"] is None
    # log 2 - 1/2 = 0.193 nats without ties, less with them; the policy is the reference.
    assert all(0 <= kl < 0.194 for kl in entry["kl"])


def samples_in(path: Path, base: str) -> list[list[str]]:
    """The texts of the samples of each prompt in the file of best-of-n."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    found: dict[int, list[str]] = {}
    for row in read_rows(path):
        for number, of_prompt in zip(row.get("rows", ()), row.get("ids", ()), strict=True):
            found[number] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in of_prompt]
    return [found[number] for number in sorted(found)]


def test_outcomes_come_from_scores_and_from_comparisons(results, made):
    gold = results["outcomes"]["gold"]
    assert len(gold) == 10  # all pairs of five systems
    sft = results["systems"]["sft"]["gold"]["gold"]
    ppo = results["systems"]["ppo"]["gold"]["gold"]
    assert gold["sft|ppo"] == [0.5 if a == b else float(a > b) for a, b in zip(sft, ppo, strict=True)]
    compared = results["outcomes"]["judges.py:longer"]
    assert list(compared) == [f"{name}|sft" for name in ("base", "best_of_2", "best_of_4", "ppo")]
    folder, _ = made
    texts = {}
    for name in ("ppo", "sft"):
        rows = read_rows(folder / "seed-0" / "completions" / f"{name}.jsonl")
        texts[name] = [plain_text(row["completion"]) for row in rows]
    expected = longer(None, texts["ppo"], texts["sft"])
    assert compared["ppo|sft"] == expected
    assert results["coverage"]["gold"]["failed"] == 0


def test_a_snapshot_is_measured_like_a_system(results):
    (snapshot,) = results["systems"]["ppo"]["snapshots"]
    assert snapshot["step"] == 5
    assert snapshot["own"] == {"seconds": 2.0, "cpu_seconds": 1.0}
    assert len(snapshot["kl"]) == len(snapshot["gold"]["gold"]) == N_PROMPTS
    assert snapshot["kl"] != results["systems"]["ppo"]["kl"]


def test_a_second_call_loads_no_model(results, setup, records, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("loaded again")

    monkeypatch.setattr("hf_rlhf_ext.recipes.compare_parts.answers.load_policy", refuse)
    assert evaluate(setup, 0, records)["systems"]["ppo"] == results["systems"]["ppo"]


def test_a_system_that_cannot_answer_is_reported_and_the_rest_go_on(results, setup, records, capsys):
    broken = SystemRecord("dpo", "dpo", "systems/dpo/policy")
    again = evaluate(setup, 0, [*records, broken])
    assert again["systems"]["dpo"]["status"] == "failed"
    assert "systems/dpo/policy" in again["systems"]["dpo"]["error"]
    assert again["systems"]["ppo"] == results["systems"]["ppo"]
    assert "ppo|dpo" not in again["outcomes"]["gold"]


def test_without_the_reference_nothing_can_be_compared(setup, records):
    with pytest.raises(UserError, match="sft"):
        evaluate(setup, 0, [record for record in records if record.name != "sft"])


def test_a_policy_that_was_trained_again_answers_again(results, setup, records, made):
    folder, base = made
    before = results["systems"]["ppo"]
    longer_trained = replace(records[-1], completions=7)
    evaluator = SeedEvaluator(setup, 0, [*records[:-1], longer_trained])
    path = folder / "seed-0" / "completions" / "ppo.jsonl"
    kept = path.read_text()
    adapter = folder / "seed-0" / "systems" / "ppo" / "policy"
    save_adapter(base, adapter, 9)
    try:
        after = evaluator.system(longer_trained)
        assert after["kl"] != before["kl"]
        assert path.read_text() != kept
    finally:
        save_adapter(base, adapter, POLICIES["ppo"])
        restored = SeedEvaluator(setup, 0, records).system(records[-1])
    assert restored["kl"] == before["kl"]


def test_another_judge_asks_for_no_new_answers(results, setup, records, monkeypatch):
    """And so does a call that was stopped between the answers and their numbers."""

    def refuse(*args, **options):
        raise AssertionError("sampled again")

    evaluator = SeedEvaluator(replace(setup, judges=[ScoreJudge(vowels, "vowels")]), 0, records)
    monkeypatch.setattr(type(evaluator.answers), "sample", refuse)
    ppo = records[-1]
    measured = evaluator.system(ppo)
    assert list(measured["gold"]) == ["vowels"]
    assert measured["kl"] == results["systems"]["ppo"]["kl"]
    assert SeedEvaluator(setup, 0, records).system(ppo)["gold"] == results["systems"]["ppo"]["gold"]
