"""Options of `hf-rlhf compare`: which systems a YAML file describes, and which mistakes are found before training."""

import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.compare_parts.data import (
    CompareData,
    in_style,
    leave_out_leaks,
    preferred,
    read_data,
    top_rated,
    within_budget,
)
from hf_rlhf_ext.recipes.compare_parts.systems import SystemOptions


def test_a_name_says_what_a_system_is(options):
    systems = {"ppo_ptx": {"kl_coef": 0.2}, "best_of_16": {}, "sft": None, "base": {}, "sft_lima_style": {"size": 3}}
    systems |= {"sft_top_rated": {}, "rejection_sampling": {"start": "ppo_ptx"}, "mine": {"kind": "dpo", "beta": 0.3}}
    args = options(systems, plain_text="texts", ratings_column="stars", dpo={"max_steps": 2})
    specs = args.specs
    assert list(specs)[:2] == ["base", "sft"]
    assert list(specs).index("rejection_sampling") > list(specs).index("ppo_ptx")
    assert specs["ppo_ptx"].kind == "ppo" and specs["ppo_ptx"].training["ptx_coef"] == 1.0
    assert specs["ppo_ptx"].training["kl_coef"] == 0.2 and specs["ppo_ptx"].training["max_steps"] == 4  # of the section
    assert specs["best_of_16"].options.n == 16
    assert specs["best_of_16"].needs(args) == ("sft", "reward_model")
    assert specs["sft_lima_style"].options.style == "lima" and specs["sft_lima_style"].needs(args) == ()
    assert specs["sft_top_rated"].options.top_rated == "ratings"
    assert specs["rejection_sampling"].needs(args) == ("ppo_ptx", "reward_model")
    assert specs["mine"].training == {"max_steps": 2, "beta": 0.3} and specs["mine"].needs(args) == ("sft",)


def test_without_a_column_of_ratings_the_labels_say_what_is_top_rated(options):
    args = options({"sft": {}, "sft_top_rated": {}})
    assert args.specs["sft_top_rated"].options.top_rated == "labels"
    assert not args.trains_reward_model  # nothing needs it


@pytest.mark.parametrize(
    "systems, changes, words",
    [
        ({}, {}, "systems: none is given"),
        ({"base": {}}, {}, "sft is missing.*add `sft: {}`"),
        ({"sft": {}, "pppo": {}}, {}, "pppo is no known system: did you mean `ppo`"),
        ({"sft": {}, "other": {}}, {}, "other is no known system.*`kind: ppo`"),
        ({"sft": {}, "x": {"kind": "pro"}}, {}, "kind 'pro' is unknown: did you mean `ppo`"),
        ({"sft": {}, "ppo": 3}, {}, "write `ppo: {}`"),
        ({"sft": {}, "best_of_n": {}}, {}, "`n` is missing"),
        ({"sft": {}, "best_of_4": {"learning_rate": 0.1}}, {}, "`learning_rate` has no effect, as best_of_n trains"),
        ({"sft": {}, "ppo": {"n": 3}}, {}, "`n` has no effect on a system of kind ppo"),
        ({"sft": {}, "ppo": {"seed": 3}}, {}, "`seed` is not an option of a system: give seeds outside"),
        ({"sft": {}, "ppo": {"lora_r": 3}}, {}, "`lora_r` is not an option of a system: all systems share it"),
        ({"sft": {}, "ppo": {"save_steps": 3}}, {}, "save_seconds outside"),
        ({"sft": {}, "ppo": {"start": "dpo"}}, {}, "start 'dpo' is no system"),
        ({"sft": {}, "ppo": {"start": "best_of_4"}, "best_of_4": {}}, {}, "best_of_4 has no policy of its own"),
        ({"sft": {}, "ppo": {"start": "dpo"}, "dpo": {"start": "ppo"}}, {}, "goes round in a circle"),
        ({"sft": {"start": "dpo"}, "dpo": {}}, {}, "sft is the reference"),
        ({"sft": {}, "sft_lime_style": {}}, {}, "style 'lime' is unknown: did you mean `lima`"),
        ({"sft": {}, "sft_b": {"size": 3}}, {}, "`size` has no effect without `style`"),
        ({"sft": {}, "sft_b": {"rule": "by hand"}}, {}, "`rule` describes demonstrations of its own"),
        ({"sft": {}, "ppo_ptx": {}}, {}, "plain_text: ppo_ptx has a language-model loss"),
        ({"sft": {}, "ppo": {}}, {"comparisons": None}, "ppo need a reward: give comparisons"),
        ({"sft": {}, "dpo": {}}, {"comparisons": None}, "comparisons: dpo is trained on them"),
        ({"sft": {}, "sft_top_rated": {}}, {"comparisons": None}, "ratings_column: sft_top_rated needs"),
        ({"sft": {}}, {"demonstrations": None}, "demonstrations: the system sft needs them"),
        ({"sft": {}, "ppo": {}}, {"reward_model": "a", "reward_funcs": "b:c"}, "reward_funcs: reward_model is given"),
        ({"sft": {}}, {"seeds": [0, 0]}, "seeds: .* twice"),
        ({"sft": {}}, {"judges": ["x"]}, "judges: 'x' is no mapping"),
        ({"sft": {}}, {"snapshot_seconds": 0}, "snapshot_seconds must be positive"),
        ({"sft": {}}, {"seeds": [2**32]}, "seeds: 4294967296 is too large"),
        ({"sft": {}}, {"reward_funcs": ["a.py:f"]}, "reward_funcs: .* is no name: give one, as text"),
        (["base", "sft"], {}, "systems: .* is no mapping of names to options: write {base: {}, sft: {}"),
        ({"sft": {}, "best_of_0": {}}, {}, "best_of_0: the best of 0 is nothing"),
        ({"sft": {}, "best_of_4": {"n": 8}}, {}, "best_of_4: its name says n is 4, and `n` 8"),
        ({"sft": {}, "ppo": {"kind": "dpo"}}, {}, "ppo is the name of a system of kind ppo, not dpo"),
        ({"sft": {}, "sft_lima_style": {"kind": "dpo"}}, {}, "the name of a system of kind sft, not dpo"),
    ],
)
def test_mistakes_are_refused_with_a_remedy(options, systems, changes, words):
    with pytest.raises(UserError, match=words):
        options(systems, **changes)


def test_options_without_effect_are_named(options):
    args = options({"sft": {}}, ratings_column="stars", grpo={"beta": 0.1})
    lines = "\n".join(args.unused())
    assert "ratings_column" in lines and "the section grpo" in lines and "comparisons, as no system" in lines
    assert options({"sft": {}, "ppo": {}}).unused() == []


# --- data ------------------------------------------------------------------------------------------------------------


def judged(prompt, targets):
    pairs = [[0, 1], [0, 2], [1, 2]][: len(targets)]
    return {"prompt": prompt, "completions": ["a", "b", "c"], "pairs": pairs, "targets": targets}


def test_the_budget_cuts_judgments_exactly():
    rows = [judged("p", [1.0, 0.0, 0.5]), judged("q", [1.0]), judged("r", [0.0, 1.0])]
    assert within_budget(rows, None, 0) == rows
    for labels in range(1, 7):
        kept = within_budget(rows, labels, 0)
        assert sum(len(row["pairs"]) for row in kept) == labels
        assert all(len(row["pairs"]) == len(row["targets"]) for row in kept)
    assert sum(len(row["pairs"]) for row in within_budget(rows, 100, 0)) == 6
    orders = {tuple(row["prompt"] for row in within_budget(rows, 6, seed)) for seed in range(10)}
    assert len(orders) > 1  # another seed, other labels


def test_only_completions_that_lost_to_none_are_preferred():
    chosen = preferred([judged("p", [1.0, 1.0, 0.5]), judged("q", [0.5]), judged("r", [1.0, 0.0])], "pairs.jsonl")
    # p: a beats b and c. q: a tie. r: a beats b, c beats a.
    assert [(row["prompt"], row["completion"]) for row in chosen.rows] == [("p", "a"), ("r", "c")]
    assert chosen.labels == {"demonstrations": 0, "judgments": 6}
    with pytest.raises(UserError, match="only ties"):
        preferred([judged("q", [0.5])], "pairs.jsonl")


def test_top_rated_demonstrations_are_of_the_rated_ones_within_the_budget():
    rows = [{"prompt": f"p{k}", "completion": "good words", "rating": float(k % 7 + 1)} for k in range(70)]
    chosen = top_rated(rows, None, None, 0, "demos.jsonl")
    assert {row["rating"] for row in chosen.rows} == {7.0} and len(chosen.rows) == 10
    assert chosen.labels == {"demonstrations": 70, "ratings": 70} and "demos.jsonl" in chosen.rule
    cut = top_rated(rows, 6.0, 14, 0, "demos.jsonl")
    assert cut.labels == {"demonstrations": 14, "ratings": 14} and all(row["rating"] >= 6 for row in cut.rows)


def test_a_style_that_chooses_by_ratings_counts_all_rows_that_it_chose_from():
    rows = [{"prompt": f"p{k}", "completion": "good words", "rating": float(k % 7 + 1)} for k in range(70)]
    chosen = in_style([*rows, {"prompt": "q", "completion": "not rated"}], SystemOptions(style="feedme"), 0, "demos")
    assert len(chosen.rows) == 10 and chosen.labels == {"demonstrations": 70, "ratings": 70}
    ranked = [{"prompt": f"p{k // 2}", "completion": f"answer {k}", "rank": k % 2 + 1} for k in range(8)]
    chosen = in_style(ranked, SystemOptions(style="guanaco"), 0, "demos")
    assert len(chosen.rows) == 4 and chosen.labels == {"demonstrations": 8}
    chosen = in_style(rows, SystemOptions(style="alpaca", size=3), 0, "demos")
    assert chosen.labels == {"demonstrations": 3}  # nothing had to be known of the others


def test_no_held_out_prompt_is_trained_on_and_ratings_are_read(options, compare_world, write_jsonl, tmp_path):
    # Of 6 prompts, 5 are held out, although the demonstrations have 4 of them.
    prompts = [f"What is number {word}?" for word in ("one", "two", "three", "four", "five", "six")]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    rows = [{"prompt": prompt, "completion": " A number.", "stars": 2} for prompt in prompts[:4]]
    other = {"prompt": "Tell me a story about a boat and its captain.", "completion": " Once.", "stars": None}
    write_jsonl(tmp_path / "demonstrations.jsonl", [*rows, other])
    changes = {name: str(tmp_path / f"{name}.jsonl") for name in ("prompts", "demonstrations")}
    changes |= {"comparisons": None, "ratings_column": "stars", "eval_prompts": 5}
    data = read_data(options({"sft": {}, "sft_top_rated": {}}, **changes), lambda: False)
    heldout = {row["prompt"] for row in data.heldout}
    trained = {row["prompt"] for row in [*data.demonstrations, *data.prompts]}
    assert not heldout & trained
    assert len(data.heldout) + data.leaks["heldout_left_out"] == 5
    assert set(prompts[4:]) <= heldout | {row["prompt"] for row in data.prompts}  # held out first: nothing is lost
    assert [row["rating"] for row in data.demonstrations if row["prompt"] == other["prompt"]] == [None]
    assert any("left out: their prompts are held out" in line for line in data.lines)


@pytest.mark.parametrize(
    ("n_leaked", "said"), [(1, "1 held-out prompt left out: it is"), (2, "2 held-out prompts left out: they are")]
)
def test_held_out_prompts_in_the_training_data_are_left_out_and_counted(n_leaked, said):
    trained = [{"prompt": f"Tell me a story about {thing}."} for thing in ("a boat and its captain", "an old gray cat")]
    new = {"prompt": "Why does the moon look larger near the horizon?"}
    data = CompareData(trained, {}, [], [], [], [*trained[:n_leaked], new], {})
    leave_out_leaks(data)
    assert data.heldout == [new] and data.leaks["heldout_left_out"] == n_leaked
    assert any(said in line for line in data.lines)


def test_messages_about_files_name_the_option_and_a_remedy_of_this_command(options, write_jsonl, tmp_path):
    other = str(write_jsonl(tmp_path / "other.jsonl", [{"x": "a"}]))
    numbers = str(write_jsonl(tmp_path / "numbers.jsonl", [{"text": 1}, {"text": 2}]))
    for changes, words in (
        ({"heldout_prompts": "nowhere.jsonl"}, "^heldout_prompts: no file"),
        ({"plain_text": "nowhere.jsonl"}, "^plain_text: no file"),
        ({"plain_text": numbers}, "^plain_text: row 0 of .* has 1 in column text"),
        ({"prompts": other}, "^prompts: .* Here: rename or remove the column in the file"),
        ({"systems": {"sft": {}, "sft_b": {"demonstrations": "no.jsonl"}}}, "^systems: sft_b: demonstrations: no file"),
    ):
        with pytest.raises(UserError, match=words):
            read_data(options(**({"systems": {"sft": {}}} | changes)), lambda: True)


def test_a_missing_column_of_ratings_is_named(options):
    args = options({"sft": {}, "sft_top_rated": {}}, ratings_column="scors")
    with pytest.raises(UserError, match="ratings_column: .* has no column scors .*stars"):
        read_data(args, lambda: False)
