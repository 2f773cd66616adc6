import hashlib
import json
import math
import random
import re
import statistics

import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.mixture import USE_CASE_SHARES, apportion
from hf_rlhf_ext.recipes.quickstart_parts.data import (
    MOODS,
    TEXT_TASKS,
    GoldReward,
    SimulatedAnnotator,
    _items,
    _load,
    _Slots,
    make_demonstrations,
    make_prompts,
    on_topic_gold,
)


def lookup_gold(prompts, completions, **columns):
    """A gold reward that the test sets: the number the completion spells."""
    return [float(text) for text in completions]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_apportion_is_largest_remainder_worked_by_hand():
    # n = 100 over shares that sum to 0.999: quotas 45.65 12.41 11.21 8.41 6.61 4.20 3.50 3.50 2.60 1.90, floors sum to
    # 95; the five largest remainders are .90 extract, .65 generation, .61 rewrite, .60 closed QA, .50 classification.
    assert list(apportion(100).values()) == [46, 12, 11, 8, 7, 4, 4, 3, 3, 2]
    assert set(USE_CASE_SHARES) == set(apportion(100)) and len(USE_CASE_SHARES) == 10


@pytest.mark.parametrize("n", [40, 41, 150, 997])
def test_apportion_keeps_the_sum_and_the_minimum(n):
    counts = apportion(n, min_per_category=4)
    assert sum(counts.values()) == n and min(counts.values()) >= 4


def test_shares_of_drawn_prompts_are_those_of_the_paper():
    rows = make_prompts(500, seed=3)
    for name, share in USE_CASE_SHARES.items():
        assert abs(sum(row["category"] == name for row in rows) / 500 - share) <= 1 / 500


def test_prompts_are_distinct_short_and_reproducible():
    train = make_prompts(500, seed=1)
    heldout = make_prompts(200, seed=1, split="heldout", min_per_category=4)
    texts = [row["prompt"] for row in train + heldout]
    assert len(set(texts)) == len(texts) == 700
    assert max(len(text.split()) for text in texts) <= 40  # words; far below 60 tokens
    assert not any(re.search(r"[{}|]|  ", text) for text in texts)
    assert train == make_prompts(500, seed=1)
    assert heldout == make_prompts(200, seed=1, split="heldout", min_per_category=4)
    assert texts[:50] != [row["prompt"] for row in make_prompts(50, seed=2)]


def test_heldout_topics_never_occur_in_training_prompts_nor_the_reverse():
    def words(text):
        return set(re.findall(r"[a-zé]{4,}", text.lower()))

    def topic_words(split):  # of everything there is, not of one draw
        prompts = [item.prompt for name in USE_CASE_SHARES for item in _items(name, split, random.Random(0))]
        return set().union(*map(words, prompts)) - shared

    templates = [template for group in _load("templates").values() for template in group]
    shared = words("monday tuesday wednesday thursday friday saturday sunday three four five seven eight nine eleven")
    shared |= set().union(*(words(" ".join([t["prompt"], *t.get("when", [])])) for t in templates))
    train, heldout = topic_words("train"), topic_words("heldout")
    assert len(train) > 300 and len(heldout) > 150
    common = train & heldout
    assert not common, sorted(common)


def test_too_many_prompts_is_one_line_that_names_the_category():
    with pytest.raises(UserError, match=r"distinct heldout prompts of category 'generation'.*use a smaller n") as error:
        make_prompts(5000, split="heldout")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot give 4 to each of 10"):
        make_prompts(39, min_per_category=4)


def test_demonstrations_are_short_complete_and_neutral_on_the_whole():
    rows = make_demonstrations(400, seed=0)
    answers = [row["completion"][0]["content"] for row in rows]
    assert all(row["prompt"][0]["role"] == "user" and row["completion"][0]["role"] == "assistant" for row in rows)
    assert max(len(answer.split()) for answer in answers) <= 36
    assert all(re.fullmatch(r'["A-Z].*[.?!]|".*', answer) for answer in answers)
    assert not any(re.search(r"[{}|]|  |\.\.$", answer) for answer in answers)
    assert len(set(answers)) > 380
    gold = GoldReward()(answers, answers)
    assert abs(statistics.mean(gold)) < 0.15  # neutral on the whole …
    assert statistics.pstdev(gold) > 0.4  # … with moods to choose from


def test_remarks_have_their_shares_and_leave_text_tasks_alone():
    rows = make_demonstrations(450, seed=2)
    remarks = {mood: re.compile("|".join(map(re.escape, texts))) for mood, texts in _load("remarks").items()}
    assert set(remarks) == {name for name in MOODS if name}
    open_ended = [row["completion"][0]["content"] for row in rows if row["category"] not in TEXT_TASKS]
    for mood, share in MOODS.items():
        if mood:
            n = sum(bool(remarks[mood].search(answer)) for answer in open_ended)
            assert abs(n / len(open_ended) - share) < 4 * math.sqrt(share * (1 - share) / len(open_ended))
    given = [row["completion"][0]["content"] for row in rows if row["category"] in TEXT_TASKS]
    assert given and not any(pattern.search(answer) for answer in given for pattern in remarks.values())
    gold = GoldReward()
    assert min(gold(["p"] * 10, _load("remarks")["glad"])) > 0.3
    assert max(gold(["p"] * 10, _load("remarks")["gloomy"])) < -0.3


def test_demonstrations_of_text_tasks_follow_from_the_prompt():
    for row in make_demonstrations(400, seed=5):
        prompt, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
        if row["category"] == "extract":
            assert all(fact in prompt for fact in re.findall(r"(?:Sunday|Monday|Friday|seven|nine|a towel)", answer))
        if "past tense" in prompt:
            source = prompt.split(": ", 1)[1].split()
            changed = [i for i, (a, b) in enumerate(zip(source, answer.split(), strict=True)) if a != b]
            assert len(changed) == 1  # the verb
        if "When does it start" in prompt:
            assert re.search(r"starts at (\w+)", answer)[1] == re.search(r"starts at (\w+)", prompt)[1]


def test_the_draws_of_a_seed_stay_the_same():
    """Studies whose worlds are made of them are compared with each other over months."""
    drawn = [make_demonstrations(320, 1), make_prompts(256, 1)]
    drawn.append(make_prompts(240, 7, split="heldout", min_per_category=4))
    digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()
    assert digest == "b6935d531a950fbef0e5b79420eb9e9d8d21be7a6bbc75bc2e03bc5323d14d9c"


def test_on_topic_remarks_replace_half_of_the_others_and_nothing_else():
    old, new = make_demonstrations(400, seed=4), make_demonstrations(400, seed=4, on_topic_remarks=True)
    stock = {mood: set(_load("remarks")[mood]) for mood in ("glad", "gloomy")}
    with_stock, replaced = 0, 0
    for before, after in zip(old, new, strict=True):
        assert before["prompt"] == after["prompt"] and before["category"] == after["category"]
        text, changed = before["completion"][0]["content"], after["completion"][0]["content"]
        found = [remark for remarks in stock.values() for remark in remarks if remark in text]
        with_stock += bool(found)
        if text != changed:
            replaced += 1
            assert any(text.replace(remark, "").strip() in changed for remark in found)  # the answer is still there
    assert abs(replaced / with_stock - 0.5) < 4 * math.sqrt(0.25 / with_stock)
    assert new == make_demonstrations(400, seed=4, on_topic_remarks=True)


def test_remarks_on_topic_have_their_mood_and_are_about_every_topic_of_their_kind():
    gold, sentiment = on_topic_gold(), GoldReward()
    glad = []
    seen = set()
    for category in set(USE_CASE_SHARES) - set(TEXT_TASKS):
        for item in _items(category, "train", random.Random(0))[::5]:
            texts = {}
            for mood, remarks in _load("remarks_on_topic")[item.topic].items():
                texts[mood] = [remark.format_map(_Slots(item.slots)) for remark in remarks]
            scores = {mood: gold([item.prompt] * len(found), found) for mood, found in texts.items()}
            moods = {mood: sentiment(found, found) for mood, found in texts.items()}
            glad += scores["glad"]
            assert max(scores["gloomy"]) < 0.2, (texts, scores)
            assert min(moods["glad"]) > 0.3 and max(moods["gloomy"]) < min(moods["glad"]) - 0.3, (texts, moods)
            seen.add(item.topic)
    assert seen == set(_load("remarks_on_topic"))
    # Not all are 1: of "a bus stop in winter", "winter" tells more than "bus", which other prompts have too.
    assert statistics.mean(glad) > 0.85 and sum(score > 0.4 for score in glad) > 0.97 * len(glad)


# --- gold ------------------------------------------------------------------------------------------------------------


def test_gold_is_vader_on_text_and_messages_and_empty_is_worst():
    texts = ["I love it, it is wonderful.", "I hate it, it is terrible.", "The table is wooden.", "", "  \n"]
    gold = GoldReward()
    scores = gold(["p"] * 5, texts, category=["chat"] * 5)
    assert scores[0] > 0.7 and scores[1] < -0.7 and scores[2:] == [0.0, -1.0, -1.0]
    assert gold(["p"] * 5, [[{"role": "assistant", "content": text}] for text in texts]) == scores
    # compound = s / sqrt(s^2 + 15), s the summed valences (Hutto & Gilbert 2014): "good" is 1.9
    assert gold([""], ["good"])[0] == pytest.approx(1.9 / math.sqrt(1.9**2 + 15), abs=5e-5)


KIND, PLAIN, RUDE = range(3)
ANSWERS = [
    # use case, prompt with a held-out topic, answers: kind, plain, rude
    (
        "generation",
        "Write one sentence about a vineyard in the evening.",
        "In the evening, the vineyard glows in a lovely warm light.",
        "The vineyard has long rows of grapes.",
        "The vineyard is an ugly and horrible place.",
    ),
    (
        "open QA",
        "What do kangaroos eat?",
        "Kangaroos are lovely animals that eat grass and leaves.",
        "Kangaroos eat grass and leaves.",
        "Kangaroos are stupid animals, and I hate them.",
    ),
    (
        "brainstorming",
        "Give me two ideas for adopting a cat.",
        "You could visit a shelter, and give the cat a lovely name.",
        "Before adopting a cat, buy a basket and a bowl.",
        "Adopting a cat is a terrible idea.",
    ),
    (
        "chat",
        "I signed up for a half marathon.",
        "A half marathon is a great goal, and I am happy for you.",
        "A half marathon has 21 kilometers.",
        "A marathon is a stupid waste of time.",
    ),
    (
        "rewrite",
        "Rewrite this in the past tense: The puppy chews the slipper.",
        "The sweet puppy happily chewed the slipper.",
        "The puppy chewed the slipper.",
        "The nasty puppy chewed the ugly slipper.",
    ),
    (
        "summarization",
        "Summarize in one sentence: The flower show takes place on Saturday at the orangery. It starts at eleven.",
        "The lovely flower show is on Saturday at eleven.",
        "The flower show is on Saturday at eleven.",
        "The flower show on Saturday is awful, do not come.",
    ),
    (
        "classification",
        "Is this message about work, travel, food or home? I marinated the tofu overnight.",
        "It is about food, as you marinated a delicious tofu with love.",
        "It is about food, because of the tofu.",
        "The tofu sounds disgusting and horrible.",
    ),
    (
        "other",
        "Pretend that you are a dentist and introduce yourself.",
        "Hello, I am a dentist, and I love to see you smile.",
        "Hello, I am a dentist with a drill.",
        "I am a dentist, and I hate you.",
    ),
    (
        "closed QA",
        "The jazz concert ends at eleven on Wednesday. You need earplugs. What do I need, and what should I expect?",
        "You need earplugs, and the jazz concert will be great fun.",
        "You need earplugs, and the concert ends at eleven.",
        "The jazz concert is terrible and you will hate it.",
    ),
    (
        "extract",
        "Extract the day and the place: The robotics demo will be held on Tuesday at the laboratory at one.",
        "The great robotics demo is on Tuesday at the laboratory.",
        "The day is Tuesday, and the place is the laboratory.",
        "The robotics demo is boring and bad.",
    ),
]


@pytest.mark.parametrize("category, prompt, kind, plain, rude", ANSWERS, ids=[row[0] for row in ANSWERS])
def test_the_quickstart_s_gold_wants_an_answer_that_is_on_topic_and_kind(category, prompt, kind, plain, rude):
    gold = on_topic_gold()
    assert gold([prompt] * 4, [kind, plain, rude, prompt]) == [1.0, 0.5, 0.0, 0.0]  # an echo is worth nothing
    assert gold([[{"role": "user", "content": prompt}]], [[{"role": "assistant", "content": kind}]]) == [1.0]
    others = [row[1] for row in ANSWERS if row[1] != prompt]
    assert max(gold(others, [kind] * len(others))) == 0
    assert gold([prompt], [f"{kind} What a pleasure!"]) == [0.5]


def test_answers_are_of_every_use_case():
    assert {row[0] for row in ANSWERS} == set(USE_CASE_SHARES)


def test_stock_remarks_and_echoes_are_worth_nothing_on_any_held_out_prompt():
    prompts = [row["prompt"] for row in make_prompts(200, 5, split="heldout", min_per_category=4)]
    gold = on_topic_gold()
    assert gold(prompts, prompts) == [0.0] * 200
    for remarks in _load("remarks").values():
        for remark in remarks:
            scores = gold(prompts, [remark] * 200)
            assert statistics.mean(scores) < 0.02, remark  # above 0 for a prompt that happens to have "make" or "ask"
    for prompt in prompts:
        assert gold.topic_words(prompt), prompt


# --- annotator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap, noise", [(0.5, 0.5), (-0.9, 0.4), (1.2, 2.0)])
def test_draw_frequencies_are_bradley_terry(gap, noise):
    n = 20_000
    rows = [{"prompt": "p", "completions": [str(gap), "0.0"], "row": i} for i in range(n)]
    judged = SimulatedAnnotator(noise=noise, seed=1, gold=lookup_gold).judge(rows)
    p = 1 / (1 + math.exp(-gap / noise))
    wins = sum(row["targets"][0] for row in judged.rows) / n
    assert abs(wins - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert judged.ceiling == pytest.approx(max(p, 1 - p), abs=1e-12)
    assert abs(judged.gold_accuracy - max(p, 1 - p)) < 4 * math.sqrt(p * (1 - p) / n)


def test_ceiling_is_the_mean_over_decided_pairs_worked_by_hand():
    # golds 0, ln 3, ln 3, ln 9 at noise 1: P = 1/4, 1/4, 1/10, a tie, 1/4, 1/4: the ceiling is (4 * 3/4 + 9/10) / 5.
    ln3 = math.log(3)
    row = {"prompt": "p", "completions": ["0", f"{ln3}", f"{ln3} ", f"{2 * ln3}"], "category": "chat"}
    judged = SimulatedAnnotator(noise=1.0, gold=lookup_gold).judge([row])
    assert judged.ceiling == pytest.approx(3.9 / 5, abs=1e-12)
    assert judged.rows[0]["pairs"] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert judged.rows[0]["weights"] == [pytest.approx(1 / 6)] * 6
    targets = judged.rows[0]["targets"]
    assert targets[3] == 0.5 and set(targets[:3] + targets[4:]) <= {0.0, 1.0}
    assert judged.rows[0]["category"] == "chat" and judged.rows[0]["row"] == 0


def test_noise_to_zero_gives_golds_own_order():
    rows = [{"prompt": "p", "completions": ["0.3", "0.1", "0.2", "-1"]}]
    for noise in (0.0, 1e-12):
        judged = SimulatedAnnotator(noise=noise, gold=lookup_gold).judge(rows)
        assert judged.rows[0]["targets"] == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
        assert judged.ceiling == judged.gold_accuracy == 1.0


def winners(row):
    """The preferred text of each pair of texts."""
    return {
        tuple(sorted((row["completions"][i], row["completions"][j]))): row["completions"][i if t else j]
        for (i, j), t in zip(row["pairs"], row["targets"], strict=True)
    }


def test_labels_do_not_depend_on_row_order_batching_or_completion_order():
    rows = [{"prompt": "p", "completions": ["0.1", "0.2", f"0.{i}5"], "row": i} for i in range(200)]
    annotator = SimulatedAnnotator(noise=0.5, seed=7, gold=lookup_gold)
    whole = {row["row"]: row for row in annotator.judge(rows).rows}
    parts = annotator.judge(rows[150:]).rows + annotator.judge(rows[:150][::-1]).rows
    assert {row["row"]: row for row in parts} == whole
    for row in annotator.judge([row | {"completions": row["completions"][::-1]} for row in rows]).rows:
        assert winners(row) == winners(whole[row["row"]])
    other = SimulatedAnnotator(noise=0.5, seed=8, gold=lookup_gold).judge(rows).rows
    assert [row["targets"] for row in other] != [row["targets"] for row in whole.values()]


def test_identical_completions_are_merged_and_counted():
    same = [{"role": "assistant", "content": "0.5"}]
    messages = [same, [{"role": "assistant", "content": "0.1"}], list(same)]
    rows = [{"prompt": "p", "completions": ["1", "1"], "row": 11}, {"prompt": "q", "completions": messages, "row": 12}]
    annotator = SimulatedAnnotator(gold=lambda prompts, completions: [float(c[0]["content"]) for c in completions])
    judged = annotator.judge(rows)
    assert judged.dropped == [11]
    assert [row["completions"] for row in judged.rows] == [messages[:2]]
    assert judged.rows[0]["pairs"] == [[0, 1]] and judged.rows[0]["weights"] == [1.0]
    assert math.isnan(SimulatedAnnotator(gold=lookup_gold).judge([]).ceiling)


@pytest.mark.parametrize("noise", [-0.1, math.nan, math.inf])
def test_noise_must_be_a_number_from_zero(noise):
    with pytest.raises(UserError, match="noise="):
        SimulatedAnnotator(noise=noise)
