import getpass
import json
import math
import os
import re
import socket
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, ModelCardData
from markdown_it import MarkdownIt
from peft import LoraConfig

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer, load_base_model
from hf_rlhf_ext.data.schema import LoadReport
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.card import KINDS, card_from_report, escape_markdown, render_card, write_card
from hf_rlhf_ext.hub.cards.owner_text import marked
from hf_rlhf_ext.hub.privacy import COMMON_NAMES, strip_local_paths
from hf_rlhf_ext.hub.report import FROM_PYTHON, RunReport
from hf_rlhf_ext.reward.scorer import RewardNormalization

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPORT = {
    "seed": 3,
    "gold_reward": "vader",
    "reward_model": {
        "pairs": 900,
        "heldout_pairs": 180,
        "decided_pairs": 160,
        "prompts": 30,
        "accuracy": 0.78125,
        "accuracy_ci95": [0.72, 0.84],
        "nll": 0.5,
        "longer_wins_baseline": 0.522,
        "annotator_ceiling": 0.853,
    },
    "ppo": {
        "updates": 16,
        "gold_before": 0.051,
        "gold_after": 0.602,
        "gold_gain_ci95": [0.45, 0.64],
        "gold_gain": 0.551,
        "proxy_before": 0.0,
        "proxy_after": 1.8,
        "kl": 8.94,
        "mean_length_before": 18.0,
        "mean_length_after": 21.5,
        "kl_coef": 0.05,
    },
    "categories": {
        "chat": {"n": 12, "gold_before": 0.2, "gold_after": 0.125},
        "extract": {"n": 4, "gold_before": 0.1, "gold_after": 0.5},
    },
    "versions": {"python": "3.11", "trl": "1.16.0"},
    "command": "python recipes/quickstart.py --seed 3",
}


@pytest.fixture
def card():
    def make(kind, report=REPORT, **options):
        return ModelCard(render_card(kind, report, **({"base_model": BASE, "adapter": {"type": "LORA"}} | options)))

    return make


def blocks_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("kind", KINDS)
def test_header_says_adapter_of_which_base_and_how_to_find_it(card, kind):
    data = card(kind).data.to_dict()
    assert data["base_model"] == BASE and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["license"] == "apache-2.0"
    assert {"trl", "rlhf", "hf_rlhf_ext"} <= set(data["tags"])
    assert data["pipeline_tag"] == ("text-classification" if kind == "reward_model" else "text-generation")
    own_tags = {"policy": "ppo", "dpo": "dpo", "reward_model": "reward-model", "sft": "sft"}
    assert set(data["tags"]) & set(own_tags.values()) == {own_tags[name] for name in own_tags if name == kind}
    assert "lora" in data["tags"] and "lora" not in card(kind, adapter={"type": "IA3"}).data.tags
    assert "lora" not in card(kind, adapter=None).data.tags  # the kind of adapter is not known


def test_results_carry_n_and_interval_in_the_table_and_in_the_model_index(card):
    reward = card("reward_model")
    (accuracy,) = reward.data.eval_results  # of the others, the Hub has no metric
    assert accuracy.metric_type == "accuracy" and accuracy.metric_value == pytest.approx(0.7812, abs=1e-4)
    # Ties have no winner.
    assert accuracy.metric_name == "Pairwise accuracy (n = 160, 95 % CI 0.720 to 0.840)"
    assert (accuracy.dataset_name, accuracy.dataset_split) == ("held-out pairs of the run", None)
    assert reward.data.metrics == ["accuracy"]
    assert "| measure | value (95 % interval) | n |" in reward.text
    assert "| Pairwise accuracy | 0.781 (0.720 to 0.840) | 160 |" in reward.text
    assert "| Negative log-likelihood, nats per pair | 0.500 | 180 |" in reward.text
    assert "180 pairs of 30 prompts were held out; accuracy is measured on the 160 pairs without a tie." in reward.text


def test_what_was_measured_before_and_after_is_in_one_row(card):
    policy = card("policy")
    assert "| measure | before | after | change (95 % interval) | n |" in policy.text
    assert "| Gold reward | 0.051 | 0.602 | +0.551 (0.450 to 0.640) | 16 |" in policy.text
    assert "| Mean length, tokens | 18.0 | 21.5 | +3.5 | 16 |" in policy.text
    assert "| KL to the initial policy, nats per completion | 8.940 | 16 |" in policy.text
    assert "PPO made 16 updates (last β = 0.05)." in policy.text
    assert "| chat | 12 | 0.200 | 0.125 |" in policy.text
    assert {result.metric_type for result in policy.data.eval_results} == {"mean_reward"}
    after = card("policy", {"ppo": {"proxy_after": 1.5, "n": 4}}).text  # there is no number before
    assert "| before" not in after and "| Proxy reward | 1.500 | 4 |" in after
    assert [result.metric_value for result in card("sft").data.eval_results] == [0.051, 0.0]
    cells = [
        cell.strip() for line in policy.text.splitlines() if line.startswith("|") for cell in line.split("|")[1:-1]
    ]
    assert cells and not {"", "–"} & set(cells)


def test_several_evaluation_sets_have_rows_and_entries_of_their_own(card):
    sets = {"easy": {"accuracy": 0.75, "decided_pairs": 4}, "hard": {"accuracy": 0.5, "decided_pairs": 8}}
    data = [
        {"role": "evaluation", "set": "hard", "name": "alice/hard", "revision": "c" * 40, "split": "test", "rows": 8}
    ]
    made = card("reward_model", {"reward_model": {"pairs": 9, "evaluation_sets": sets}}, data=data)
    assert "| easy | Pairwise accuracy | 0.750 | 4 |" in made.text
    assert "| hard | Pairwise accuracy | 0.500 | 8 |" in made.text
    easy, hard = made.data.eval_results
    assert (easy.dataset_type, easy.dataset_split) == ("custom", None) and "easy" in easy.dataset_name
    assert (hard.dataset_type, hard.dataset_split, hard.dataset_revision) == ("alice/hard", "test", "c" * 40)
    assert "Not measured" not in made.text


def test_limits_are_measured(card):
    text = card("policy").text
    assert "gold reward decreased in: chat (0.20 to 0.12, n = 12)." in text
    assert "fewer than ten held-out prompts, too few for a conclusion: extract." in text
    assert "from 18.0 to 21.5 tokens" in text and "135 million" in text and "lexicon" in text
    assert "Q4_1" not in text
    worse = REPORT | {"reward_model": REPORT["reward_model"] | {"accuracy": 0.5}}
    assert "not better than preferring the longer" in card("reward_model", worse).text
    assert "not better than preferring the longer" not in card("reward_model").text


def test_embedded_base_is_named_by_its_hub_id_and_owned_up_to(card):
    made = card("policy", base_model="embedded:smollm2-135m-instruct")
    assert made.data.base_model == BASE and "Q4_1" in made.text and "embedded:" not in made.content


def test_config_command_versions_plot_and_citations(card, tmp_path):
    (tmp_path / "frontier.png").write_bytes(b"png")
    options = {"config": {"load_in_4bit": True, "lr": 1e-4}, "plot": tmp_path / "frontier.png", "base_model": BASE}
    made = write_card(tmp_path / "policy", "policy", REPORT, **options).read_text(encoding="utf-8")
    for shown in ("python recipes/quickstart.py --seed 3", "lr: 0.0001", "trl 1.16.0"):
        assert shown in made
    assert "](frontier.png)" in made and (tmp_path / "policy" / "frontier.png").read_bytes() == b"png"
    for paper in ("vonwerra2020trl", "2203.02155", "1707.06347", "2305.14314", "VADER"):
        assert paper in made
    assert "2305.14314" not in card("policy", config="load_in_4bit: false").text
    assert "Biometrika" in card("reward_model").text
    assert "vonwerra2020trl" not in card("model").text  # what trained it is not known


def test_a_card_of_other_data_shows_what_was_measured(card):
    text = card("reward_model", {"reward_model": {"accuracy": 0.6, "heldout_pairs": 200, "pairs": 500}}).text
    assert (
        "Trained" not in text and "CPU" not in text and "Versions" not in text
    )  # this machine's are not those of the run
    assert "simulated" not in text and "noisy" not in text and "0.600" in text
    text = card("policy", {"ppo": {"kl": 3.0}}).text
    assert "VADER" not in text and "3.000" in text
    for kind in KINDS:  # values that old reports lack are not in the card
        empty = card(kind, {})
        assert empty.data.eval_results is None and "## Results" not in empty.text


def test_a_recipes_policy_shows_n_beta_and_second_opinions_without_a_gold_reward(card):
    ppo = {"n": 24, "updates": 8, "kl": 3.5, "kl_ci95": [3.0, 4.0], "kl_coef": 0.05, "rewards": ["reward_model"]}
    ppo |= {"proxy_before": -0.1, "proxy_after": 0.9, "proxy_gain": 1.0, "proxy_gain_ci95": [0.8, 1.2]}
    ppo |= {"eval_rewards": ["a_judge", "silent"], "a_judge_before": 0.4, "a_judge_after": 0.3, "a_judge_gain": -0.1}
    ppo |= {"a_judge_gain_ci95": [-0.2, 0.1], "stop_reason": "KL is 9.1 nats, above max_kl = 8 <b>"}
    text = card("policy", {"ppo": ppo}).text
    older = {name: value for name, value in ppo.items() if name != "stop_reason"}
    older["stopped_by"] = ppo["stop_reason"]  # its name in reports of version 0.1
    assert card("policy", {"ppo": older}).text == text
    rows = ["| Proxy reward | -0.100 | 0.900 | +1.000 (0.800 to 1.200) | 24 |"]
    rows += [r"| Reward a\_judge, unseen by PPO | 0.400 | 0.300 | -0.100 (-0.200 to 0.100) | 24 |"]
    rows += ["completion | 3.500 (3.000 to 4.000) | 24 |", "PPO made 8 updates (last β = 0.05)."]
    assert all(row in text for row in rows), text
    limits = text.split("## Limits")[1]
    assert r"Reward a\_judge, which PPO did not use, decreased by 0.100" in limits
    assert r"A guard stopped training early: KL is 9.1 nats, above max\_kl = 8 &lt;b&gt;" in limits


def test_an_sft_recipes_card_shows_its_loss(card):
    sft = {"eval_loss": 1.25, "eval_mean_token_accuracy": 0.75, "heldout_rows": 40, "train_loss": 0.5}
    made = card("sft", {"sft": sft})
    assert "| Loss, nats per token | 1.250 | 40 |" in made.text
    assert "| Accuracy of the next token | 0.750 | 40 |" in made.text
    assert made.data.eval_results[0].dataset_name == "held-out demonstrations of the run"
    assert [result.metric_type for result in made.data.eval_results] == ["loss", "accuracy"]


def test_a_reward_models_length_bias_and_gain_are_in_its_card(card):
    gaps = {"0 to 2": {"n": 20, "accuracy": 0.55}, "2 to 9": {"n": 21, "accuracy": 0.7}}
    gaps |= {"9 to 40": {"n": 22, "accuracy": 0.9}}
    measured = REPORT["reward_model"] | {"groups": {"length_gap": gaps, "a|b": {"<c>": {"n": 1, "accuracy": 1.0}}}}
    measured |= {"gain": 0.259, "gain_ci95": [-0.1, 0.4], "brier": 0.15, "ece": 0.05}
    text = card("reward_model", {"reward_model": measured}).text
    assert "accuracy is 0.550 (n = 20) if both completions have a similar length (0 to 2 tokens apart)" in text
    assert "may be chance" in text and "| Expected calibration error | 0.050 | 180 |" in text
    assert "| Gain in accuracy over preferring the longer completion | 0.259 (-0.100 to 0.400) | 160 |" in text
    assert r"| a\|b | &lt;c&gt; |" in text


def test_an_ensemble_names_its_members(card):
    ensemble = {"pairs": 9, "accuracy": 0.7, "disagreement": 0.25, "combine": "min"}
    ensemble |= {"members": [{"accuracy": 0.6, "nll": 0.61}, {"pairs": 9}]}
    made = card("reward_model", {"reward_model": ensemble}, repo_id="alice/both")
    assert "ensemble of 2" in made.text and "(combined by min)" in made.text
    assert "- member 0: accuracy 0.600, 0.610 nats per pair" in made.text and "member 1" not in made.text
    assert "standard deviation of their rewards | 0.250 |" in made.text
    assert 'RewardEnsemble.from_pretrained("alice/both")' in made.text and "AutoModel" not in made.text
    assert made.data.library_name == "hf_rlhf_ext"


def test_results_name_the_data_set_and_its_commit(card):
    made = card("policy", datasets=["alice/prompts"], dataset_revision="abc123")
    found = made.data.eval_results[0]
    assert (found.dataset_type, found.dataset_revision) == ("alice/prompts", "abc123")
    assert made.data.datasets == ["alice/prompts"]
    assert card("policy").data.eval_results[0].dataset_revision is None
    assert found.dataset_split is None


def test_what_is_not_published_says_so_and_the_snippet_has_the_system_prompt(card):
    made = card("policy", repo_id="runs/quickstart/policy", system_prompt='Say "hi".').text
    assert "No weights are published with this card." in made and "the folder `runs/quickstart/policy`" in made
    for snippet in blocks_of(made):
        compile(snippet, "snippet", "exec")
        assert r'{"role": "system", "content": "Say \"hi\"."}' in snippet
    assert "No weights" not in card("policy", repo_id="alice/policy").text


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_that_its_base_was_in_4_bits(card, kind):
    made = card(kind, load_in_4bit=True).text
    assert "bitsandbytes`" in made and "4 bits" in made.split("## Limits")[1] and "2305.14314" in made
    merged = card(kind, load_in_4bit=True, relation="merge").text
    assert "4 bits" in merged.split("## Limits")[1] and "BitsAndBytesConfig" not in merged
    assert "4 bits" not in card(kind, base_dtype="float32").text


def test_a_reward_model_s_folder_knows_the_precision_of_its_base(tmp_path):
    def written():
        return write_card(tmp_path, "reward_model", REPORT, base_model=BASE).read_text(encoding="utf-8")

    RewardNormalization(base_dtype="bfloat16", autocast="bfloat16").save(tmp_path)
    assert 'num_labels=1,\n    dtype="bfloat16",\n)' in written()
    assert "torch.autocast(model.device.type, torch.bfloat16)" in written()
    RunReport.from_dict(REPORT | {"card": {"kind": "reward_model"}}).save(tmp_path)
    assert RunReport.load(tmp_path).card.base_dtype == "bfloat16"
    RewardNormalization().save(tmp_path)  # "auto": not known
    assert "dtype=" not in written()


def test_samples_cannot_break_the_card(card):
    evil = "# H\n---\n<script>alert(1)</script> | {{ 7*7 }} ![x](http://y) ``` **b** <!--"
    text = card("policy", samples=[{"prompt": evil, "before": evil, "after": "plain"}]).text
    assert "<script>" not in text and "\n---" not in text and "\n# H" not in text and "<!--" not in text
    assert "49" not in text.split("## Samples")[1].split("## Limits")[0] and "](http://y" not in text
    assert escape_markdown("a_b *c* `d`\n\ne") == r"a\_b \*c\* \`d\` ⏎ e"


def test_a_policy_by_dpo_claims_no_ppo(card):
    dpo = {"start": "the SFT policy", "pairs": 40, "beta": 0.1, "n": 24, "kl": 1.5, "kl_ci95": [1.0, 2.0]}
    dpo |= {"gold_before": 0.1, "gold_after": 0.3, "gold_gain": 0.2, "mean_length_before": 9.0}
    dpo |= {"mean_length_after": 8.0}
    made = card("dpo", {"dpo": dpo})
    assert "dpo" in made.data.tags and "ppo" not in made.data.tags
    for shown in (
        "trained by DPO",
        "starting from the SFT policy",
        "40 judged pairs (β = 0.1)",
        "from 9.0 to 8.0 tokens",
    ):
        assert shown in made.text
    assert "| KL to the initial policy, nats per completion | 1.500 (1.000 to 2.000) | 24 |" in made.text
    assert "| Gold reward | 0.100 | 0.300 | +0.200 | 24 |" in made.text
    assert "rafailov2023direct" in made.text
    for other in ("PPO", "schulman2017proximal", "proxy", "critic"):
        assert other not in made.text, other
    assert RunReport.from_dict({"dpo": dpo}).to_dict() == {"dpo": dpo}


NASTY = ["# H\n---\n<script>x</script> |a|b| ![x](http://y) *b* `c`", "```\n</details>\n# H2", "[l](http://z)\n\n- i"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("evil", NASTY)
def test_no_text_breaks_out_of_its_place(card, kind, evil):
    """With a Markdown parser, a card with unsafe names has the same structure as one with plain names."""
    row = {"n": 12, "gold_before": 0.2, "gold_after": 0.1}

    def shape(text):
        ppo = REPORT["ppo"] | {"start": text, "rewards": [text], "stop_reason": text}
        ppo |= {"eval_rewards": [text], f"{text}_before": 0.5, f"{text}_after": 0.25, f"{text}_gain": -0.25}
        model = REPORT["reward_model"] | {"groups": {text: {text: {"n": 1, "accuracy": 0.5}}}, "combine": text}
        model |= {"members": [{}], "length_gap": {}}
        report = REPORT | {"ppo": ppo, "reward_model": model, "categories": {text: row}, "seed": text}
        report |= {"command": f"python x.py --run '{text}'", "hardware": text, "versions": {text: text}}
        options = {"model_name": text, "config": f"mix: |\n  {text}", "lineage": {text: text}, "caption": text}
        options |= {"plot": None, "samples": [dict.fromkeys(("prompt", "before", "after"), text)]}
        options |= {"repo_id": "alice/x", "base_model": f"base {text}", "system_prompt": text, "base_revision": text}
        options |= {"revision": text, "language": text, "license_name": text, "license_link": f"https://{text}"}
        options |= {"adapter": {"type": text, "r": 4, "target_modules": [text, text], "init": text}, "max_length": 9}
        data = {"role": text, "name": text, "config": text, "split": text, "rows": 3, "set": text}
        options |= {"data": [data, data | {"revision": text}, {"role": "evaluation", "sha256": text}], "notes": ["a"]}
        made = card(kind, report, **options)
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(made.text)
        inline = [child.type for token in tokens for child in token.children or ()]
        snippets = [token.content for token in tokens if token.info == "python"]
        assert len(snippets) > 1 or kind == "reward_model"
        for snippet in snippets:
            compile(snippet, "snippet", "exec")
        assert "base_model" not in yaml.safe_load(made.data.to_yaml())  # the Hub refuses what cannot be an id
        return [t.type for t in tokens], [t for t in inline if t not in ("text", "text_special", "softbreak")]

    assert shape(evil) == shape("plain words")  # no id, which would be a link


@pytest.mark.parametrize("value", [None, math.nan, "0.5"])
def test_a_number_that_is_missing_or_not_finite_is_a_users_error(card, value):
    with pytest.raises(UserError, match=r"report\['ppo'\]\['kl'\] is .* needs a finite number"):
        card("policy", REPORT | {"ppo": REPORT["ppo"] | {"kl": value}})
    with pytest.raises(UserError, match=r"kind 'critic' does not exist; choose one of policy"):
        card("critic")


# --- no local paths or names -----------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A home folder and a user with a name that can be found, a working folder inside it, and a token."""
    home = tmp_path / "homes" / "zelda77"
    (home / "my code").mkdir(parents=True)
    names = {"HOME": str(home), "LOGNAME": "zelda77", "USER": "zelda77", "HF_TOKEN": "secret-token-1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(home / "my code")
    assert getpass.getuser() == "zelda77" and Path.home() == home
    return home


@pytest.mark.parametrize("kind", KINDS)
def test_no_trace_of_the_machine_in_a_card(card, machine, kind):
    token = "hf_" + "aB3dE6gH9j" * 3
    here = f"{Path.cwd()}/runs --a {machine}/data/x.jsonl --b ~/y.json {token} {socket.gethostname()} secret-token-1"
    report = REPORT | {"command": f"python {here}", "versions": {"local": f"1.0 from file://{machine}/src"}}
    config = {"output_dir": str(machine / "out"), "user": "zelda77", "token": token, "data": "/mnt/disk two/z"}
    given = {"model_name": "zelda77-model", "limits": [f"Made in {machine}."]}
    given |= {
        "data": [{"role": "comparisons", "name": f"{machine}/pairs.jsonl"}],
        "adapter": {"type": "LORA", "at": here},
    }
    content = card(kind, report, config=config, **given).content
    for secret in (str(machine), str(Path.cwd()), "zelda77", socket.gethostname(), token, "secret-token-1", "/mnt"):
        assert secret not in content, secret
    assert "x.jsonl" in content and "runs" in content  # the command is still readable
    yaml.safe_load(re.search(r"```yaml\n(.*?)```", content, re.DOTALL)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_no_trace_of_this_very_machine(card, kind):
    here = f"python {os.getcwd()}/x.py --out {Path.home()}/y --user {getpass.getuser()}@{socket.gethostname()}"
    content = card(kind, REPORT | {"command": here}).content
    for secret in (os.getcwd(), str(Path.home()), socket.gethostname()):
        assert len(secret) < 2 or secret not in content
    user = getpass.getuser()
    assert user in COMMON_NAMES or not re.search(rf"(?<!\w){re.escape(user)}(?!\w)", content)


@pytest.mark.parametrize(
    "text, stripped",
    [
        ("/data/sets/a.jsonl", "<path>/a.jsonl"),
        ("--x=/data/a.jsonl,/b/c", "--x=<path>/a.jsonl,<path>/c"),
        ("'/a/b/'", "'<path>/b'"),
        ("file:///a/b.txt", "<path>/b.txt"),
        ("~/a/b.txt ~bob/c", "<path>/b.txt <path>/c"),
        ("../../shared/a.jsonl", "<path>/a.jsonl"),
        (r"C:\Users\bob\a.jsonl", "<path>/a.jsonl"),
        (r"\\server\share\a.jsonl", "<path>/a.jsonl"),
        ("reward/nat, 1/2 and recipes/configs/a.yaml", "reward/nat, 1/2 and recipes/configs/a.yaml"),
        ("https://huggingface.co/a/b and hf://x/y", "https://huggingface.co/a/b and hf://x/y"),
        ("HuggingFaceTB/SmolLM2", "HuggingFaceTB/SmolLM2"),
    ],
)
def test_paths_are_cut_to_their_last_part_and_nothing_else_is_touched(machine, text, stripped):
    assert strip_local_paths(text) == stripped
    assert strip_local_paths(stripped) == stripped


def test_paths_below_the_working_folder_stay_runnable(machine):
    here = Path.cwd()
    assert strip_local_paths(f"python {here}/recipes/ppo.py --out {here}") == "python recipes/ppo.py --out ."


# --- the shipped cards -----------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "model_cards").iterdir())


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_card_is_what_its_report_gives(folder):
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    shown = (folder / "README.md").read_text(encoding="utf-8")
    assert shown == marked(card_from_report(report)), "run `make cards`"
    if plot := report["card"].get("plot"):
        assert (folder / plot).is_file() and f"]({plot})" in shown


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_the_numbers_of_a_shipped_card_are_those_of_the_run(folder):
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    run = json.loads((ROOT / "docs" / "quickstart" / "seed0.json").read_text(encoding="utf-8"))
    decided = report["reward_model"].pop("decided_pairs", None)
    assert {name: report[name] for name in run} == run
    if decided is not None:  # the only number of pairs that the run's accuracy can be a share of
        pairs, accuracy = run["reward_model"]["heldout_pairs"], run["reward_model"]["accuracy"]
        assert [n for n in range(1, pairs + 1) if abs(accuracy * n - round(accuracy * n)) < 1e-9] == [decided]


def test_shipped_cards_say_what_speaks_against_them():
    policy, reward, sft = ((folder / "README.md").read_text(encoding="utf-8") for folder in SHIPPED)
    for seed in range(3):
        run = json.loads((ROOT / "docs" / "quickstart" / f"seed{seed}.json").read_text(encoding="utf-8"))["ppo"]
        assert "{:+.3f} ({:+.3f} to {:+.3f})".format(run["gold_gain"], *run["gold_gain_ci95"]) in policy
    assert re.search(r"flattery .*? \d+% .*? \d+%", reward) and "Not ready for PPO" in reward
    assert "best of three" in policy and "I am happy to help" in policy.split("## Limits")[1]
    for card in (policy, reward, sft):
        assert "No weights are published" in card and "cut at 32 tokens" in card and "learning_rate" in card
        assert '"Answer in one or two sentences."' in card and "weights the numbers were not measured" in card


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_the_metadata_of_a_shipped_card_is_valid(folder):
    data = ModelCard.load(folder / "README.md").data
    again = ModelCardData(**yaml.safe_load(data.to_yaml()))
    assert again.to_dict() == data.to_dict() and data.eval_results and data.base_model == BASE


def test_there_is_a_card_for_every_stage():
    assert [path.name for path in SHIPPED] == ["quickstart-ppo", "quickstart-reward", "quickstart-sft"]


# --- merged models and lineage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_says_so(card, kind):
    made = card(kind, relation="merge", repo_id="a/merged")
    assert made.data.base_model_relation == "merge" and made.data.library_name == "transformers"
    assert "lora" not in made.data.tags and "with a merged LoRA adapter" in made.text
    assert "PeftModel" not in made.text and "import peft" not in made.text


def test_lineage_links_what_is_on_the_hub_and_escapes_the_rest(card):
    lineage = {"SFT policy": "alice/sft@abc123", "prompts": "datasets/a/b", "pairs": "local *x*.jsonl (sha256 12)"}
    report = REPORT | {"seconds": {"sft": 90, "ppo": 7200}}
    text = card("policy", lineage=lineage, report=report).text
    assert "- SFT policy: [alice/sft@abc123](https://huggingface.co/alice/sft/tree/abc123)" in text
    assert "- prompts: [datasets/a/b](https://huggingface.co/datasets/a/b)" in text
    assert r"local \*x\*.jsonl \(sha256 12\)" in text
    assert "Trained in 2 hours" in text and "Trained in 1.5 minutes" in card("sft", report).text
    assert "Trained in less than a minute" in card("sft", REPORT | {"seconds": {"sft": 1.2}}).text


def test_a_report_without_card_options_has_no_card():
    assert card_from_report(REPORT) is None
    assert "kl" in card_from_report(REPORT | {"card": {"kind": "policy"}}, repo_id="a/b").lower()


# --- a push from Python, without a recipe ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["policy", "reward_model"])
def test_a_trainer_pushed_from_python_has_a_card_with_its_last_evaluation(
    hub, kind, tiny_llama, chat_tokenizer, tmp_path
):
    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=tmp_path / "base")
    policy = kind == "policy"
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "per_device_train_batch_size": 2}
    options |= {"activation_checkpointing": False, "save_strategy": "no", "disable_tqdm": True}
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM" if policy else "SEQ_CLS")
    model = load_base_model("alice/base", task="causal_lm" if policy else "reward")
    given = {"processing_class": chat_tokenizer, "peft_config": lora}
    if policy:
        rows = Dataset.from_dict({"prompt": ["Tell me", "a sunny day", "fox", "words, many"]})
        args = PPOConfig(str(tmp_path / "out"), max_completion_length=4, num_mini_batches=1, critic="head", **options)
        given |= {"args": args, "train_dataset": rows, "eval_dataset": rows}
        trainer = PPOTrainer(model, lambda completions, **_: [float(len(text)) for text in completions], **given)
    else:
        rows = Dataset.from_list([{"prompt": f"Day {i}?", "chosen": "Sunny!", "rejected": "No."} for i in range(4)])
        args = BradleyTerryConfig(str(tmp_path / "out"), **options)
        trainer = BradleyTerryTrainer(model, args=args, train_dataset=rows, eval_dataset=rows, **given)
    trainer.train()
    trainer.push_to_hub()
    first = ModelCard.load("alice/out")
    assert first.data.base_model == "alice/base" and first.data.base_model_relation == "adapter"
    assert not first.data.eval_results and "started from Python" in first.text
    assert f"trl {version('trl')}" in first.text
    key, label = ("eval_objective/kl", "KL to the") if policy else ("eval_accuracy", "Pairwise accuracy")
    value = trainer.evaluate()[key]
    trainer.push_to_hub()
    text = ModelCard.load("alice/out").text
    (row,) = [line for line in text.splitlines() if f"| {label}" in line]
    assert f" {value:.3f} " in row and row.endswith("| 4 |")
    if not policy:
        assert "](evaluation.png)" in text and hub.files("alice/out")["evaluation.png"].startswith(b"\x89PNG")
        assert re.search(r"^\| length gap \| .* \| \d\.\d{3} \| 4 \|$", text, re.MULTILINE)


def test_model_details_say_what_is_known_and_nothing_else(card):
    commit = "0123456789abcdef0123456789abcdef01234567"
    data = [{"role": "comparisons", "name": "alice/pairs", "revision": commit, "split": "train", "rows": 900}]
    data += [{"role": "evaluation", "name": "held.jsonl", "rows": 90, "sha256": "f" * 64}]
    lora = {"type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    options = {"base_revision": commit, "data": data, "adapter": lora, "max_length": 512, "prompt_form": "messages"}
    options |= {"chat_template": "base", "license_name": "llama3", "license_link": "https://a.b/license"}
    made = card("reward_model", {"license": "other"}, base_dtype="bfloat16", autocast="bfloat16", **options).text
    details = made.split("## Model details")[1].split("## Usage")[0]
    for shown in (
        f"at revision [`0123456`](https://huggingface.co/{BASE}/tree/{commit})",
        "LoRA, rank 16, α = 32, rank-stabilized, on `q_proj` and `v_proj`",
        "base in bfloat16, autocast to bfloat16, in training",
        "messages, in the base's chat template",
        "512 tokens",
        "comparisons: [alice/pairs](https://huggingface.co/datasets/alice/pairs) (split `train`, 900 rows, revision",
        "`held.jsonl` (90 rows, SHA-256 `ffffffffffffffff`…)",
        "[llama3](https://a.b/license)",
    ):
        assert shown in details, shown
    bare = card("model", {}, base_model=None, relation="finetune", adapter=None).text
    assert "Model details" not in bare and "How it was trained is not recorded" in bare and "None" not in bare


def test_start_and_rewards_are_those_of_the_run_or_are_not_mentioned(card):
    made = card("policy", {"ppo": {"start": "the adapter alice/sft", "rewards": ["short", "a|b"]}}).text
    assert "starting from the adapter alice/sft, to maximize the reward `short` and `a|b`." in made
    unknown = card("policy", {"ppo": {"kl": 1.0, "start": "an adapter"}}).text  # what earlier versions wrote
    assert "starting from" not in unknown and "reward_model" not in unknown and "to maximize" not in unknown
    old = card("policy", {"ppo": {"start": "an adapter"}}, lineage={"SFT policy": "alice/sft"}).text
    assert "starting from the SFT policy" in old


def test_examples_emissions_and_names_are_in_the_header(card):
    samples = [{"prompt": f"Day {k}?", "before": "No.", "after": "Yes."} for k in range(4)]
    emissions = {"energy_kwh": 0.0123, "emissions_g": 4.5}
    given = {"samples": samples, "emissions": emissions, "repo_id": "alice/nice-ppo", "tags": ["mine", "trl"]}
    made = card("policy", system_prompt="Be kind.", **given)
    first = made.data.to_dict()["widget"][0]
    assert first["messages"][0] == {"role": "system", "content": "Be kind."} and first["output"] == {"text": "Yes."}
    assert len(made.data.to_dict()["widget"]) == 3
    assert made.data.co2_eq_emissions["emissions"] == 4.5 and "0.0123 kWh and 4.5 g of CO₂" in made.text
    assert made.data.model_name == "nice-ppo" and made.text.strip().startswith("# nice-ppo\n")
    assert made.data.tags.count("trl") == 1 and "mine" in made.data.tags
    plain = card("policy", prompt_form="text", **given).data.to_dict()
    assert plain["widget"][0] == {"text": "Day 0?", "output": {"text": "Yes."}}
    assert "widget" not in card("reward_model").data.to_dict()


@pytest.mark.parametrize("kind", ["reward_model", "sft"])
def test_the_card_says_which_rows_and_columns_were_read(kind):
    read = LoadReport("/home/jane/pairs.csv", 3, 2, {"chosen is not text": [1]}, unread={"system": "text, ignored"})
    card = render_card(kind, {}, rows_read=[read.summary()])
    (line,) = [line for line in card.splitlines() if "rows kept" in line]
    assert "2 of 3 rows kept" in line and "dropped: chosen is not text" in line and "not read: system" in line
    assert "jane" not in card
    assert "columns read" not in render_card(kind, {})


def test_nothing_is_said_of_a_run_that_left_no_record_of_it(card):
    text = card("reward_model", {}).text  # from files alone
    assert "Bradley-Terry" not in text.split("## Citations")[0] and "held out" not in text
    assert "Its accuracy is not recorded." in text and "## How it was made" not in text
    recipe = card("reward_model", {"command": "hf-rlhf reward"}).text
    assert "with the Bradley-Terry loss" in recipe and "Not measured: no comparisons were held out." in recipe


def test_rows_of_a_run_from_python_are_not_called_held_out(card):
    report = {"command": FROM_PYTHON, "reward_model": {"accuracy": 0.5, "decided_pairs": 4}}
    (accuracy,) = card("reward_model", report, datasets=["alice/pairs"]).data.eval_results
    assert (accuracy.dataset_type, accuracy.dataset_name) == ("custom", "evaluation pairs of the run")
    report["command"] = "hf-rlhf reward"  # which holds them out from the training data
    (accuracy,) = card("reward_model", report, datasets=["alice/pairs"]).data.eval_results
    assert (accuracy.dataset_type, accuracy.dataset_name) == ("alice/pairs", "held-out pairs of the run")


def test_ppo_without_a_penalty_is_not_said_to_have_one(card):
    assert "trained by PPO with a KL penalty" in card("policy").text
    assert "trained by PPO." in card("policy", {"ppo": {"kl_coef": 0.0}}).text


def test_an_old_report_calls_the_reward_by_its_lineage(card):
    ppo = {"rewards": ["reward_model"], "proxy_before": 0.0, "proxy_after": 1.0}
    text = card("policy", {"ppo": ppo}, lineage={"reward model": "alice/reward"}).text
    assert text.count("[alice/reward](https://huggingface.co/alice/reward)") == 3 and "`reward_model`" not in text


def test_empty_completions_and_data_without_a_name_are_words(card):
    sample = {"prompt": "Say nothing.", "before": "", "after": "- no"}
    data = [{"role": "comparisons", "rows": 1}]
    text = card("dpo", samples=[sample], data=data, adapter={"target_modules": "q|v", "type": "LORA"}).text
    assert "- before: *(empty)*\n- after: \\- no" in text
    assert "**Training data:** comparisons (1 row)" in text and "on `q|v`" in text
