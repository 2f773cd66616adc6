import getpass
import json
import math
import os
import re
import socket
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.card import KINDS, card_from_report, escape_markdown, write_card
from hf_rlhf_ext.hub.privacy import strip_local_paths

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPORT = {
    "seed": 3,
    "reward_model": {
        "pairs": 900,
        "heldout_pairs": 180,
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
def card(tmp_path):
    def make(kind, report=REPORT, **options):
        return ModelCard.load(write_card(tmp_path / kind, kind, report, **options))

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_header_says_adapter_of_which_base_and_how_to_find_it(card, kind):
    data = card(kind).data.to_dict()
    assert data["base_model"] == BASE and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["license"] == "apache-2.0"
    assert {"trl", "rlhf", "hf_rlhf_ext"} <= set(data["tags"])
    assert data["pipeline_tag"] == ("text-classification" if kind == "reward_model" else "text-generation")
    assert {"policy": "ppo", "reward_model": "reward-model", "sft": "sft"}[kind] in data["tags"]


def test_results_carry_n_and_interval_in_the_table_and_in_the_model_index(card):
    reward = card("reward_model")
    results = {result.metric_type: result for result in reward.data.eval_results}
    assert results["accuracy"].metric_value == pytest.approx(0.7812, abs=1e-4)
    assert "95 % CI 0.720 to 0.840" in results["accuracy"].metric_name and "n = 180" in results["accuracy"].dataset_name
    assert "| Pairwise accuracy | 0.781 | 0.720 to 0.840 | 180 |" in reward.text
    policy = card("policy")
    assert "| Gain in gold reward over the SFT policy | 0.551 | 0.450 to 0.640 | 16 |" in policy.text
    assert "8.9 nats of KL a completion (β = 0.05)" in policy.text
    assert "| chat | 12 | 0.200 | 0.125 |" in policy.text
    sft = [result.metric_type for result in card("sft").data.eval_results]
    assert sft == ["gold_before", "proxy_before", "mean_length_before"]


def test_limits_are_measured(card):
    text = card("policy").text
    assert "Gold reward fell in: chat (0.20 to 0.12, n = 12)." in text
    assert "too few to conclude from: extract." in text
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
    made = card("policy", config={"load_in_4bit": True, "lr": 1e-4}, plot=tmp_path / "frontier.png")
    for shown in ("python recipes/quickstart.py --seed 3", "lr: 0.0001", "trl 1.16.0"):
        assert shown in made.text
    assert "](frontier.png)" in made.text and (tmp_path / "policy" / "frontier.png").read_bytes() == b"png"
    for paper in ("2203.02155", "1707.06347", "2305.14314", "VADER"):
        assert paper in made.text
    assert "2305.14314" not in card("policy", config="load_in_4bit: false").text
    assert "Biometrika" in card("reward_model").text


@pytest.mark.parametrize("kind", KINDS)
def test_snippet_is_python(card, kind):
    snippets = re.findall(r"```python\n(.*?)```", card(kind, repo_id="someone/policy").text, re.DOTALL)
    assert len(snippets) == 1 and "someone/policy" in snippets[0] and BASE in snippets[0]
    compile(snippets[0], kind, "exec")


def test_a_card_of_other_data_shows_what_was_measured(card):
    text = card("reward_model", {"reward_model": {"accuracy": 0.6, "heldout_pairs": 200, "pairs": 500}}).text
    assert "simulated" not in text and "noisy" not in text and "0.600" in text
    text = card("policy", {"ppo": {"kl": 3.0}}).text
    assert "VADER" not in text and "3.000" in text
    assert card("sft", {}).data.eval_results is None


def test_samples_cannot_break_the_card(card):
    evil = "# H\n---\n<script>alert(1)</script> | {{ 7*7 }} ![x](http://y) ``` **b** <!--"
    text = card("policy", samples=[{"prompt": evil, "before": evil, "after": "plain"}]).text
    assert "<script>" not in text and "\n---" not in text and "\n# H" not in text and "<!--" not in text
    assert "49" not in text.split("## Samples")[1].split("## Limits")[0] and "](http://y" not in text
    assert escape_markdown("a_b *c* `d`\n\ne") == r"a\_b \*c\* \`d\` ⏎ e"


@pytest.mark.parametrize("value", [None, math.nan, "0.5"])
def test_a_number_that_is_missing_or_not_finite_is_a_users_error(card, value):
    with pytest.raises(UserError, match=r"report\['ppo'\]\['kl'\] is .* needs a finite number"):
        card("policy", REPORT | {"ppo": REPORT["ppo"] | {"kl": value}})
    with pytest.raises(UserError, match=r"kind 'critic' does not exist; choose one of policy"):
        card("critic")


# --- nothing of the machine ------------------------------------------------------------------------------------------


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
    content = card(kind, report, config=config, model_name="zelda77-model", limits=[f"Made in {machine}."]).content
    for secret in (str(machine), str(Path.cwd()), "zelda77", socket.gethostname(), token, "secret-token-1", "/mnt"):
        assert secret not in content, secret
    assert "x.jsonl" in content and "runs" in content  # still a command that one can read
    yaml.safe_load(re.search(r"```yaml\n(.*?)```", content, re.DOTALL)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_no_trace_of_this_very_machine(card, kind):
    here = f"python {os.getcwd()}/x.py --out {Path.home()}/y --user {getpass.getuser()}@{socket.gethostname()}"
    content = card(kind, REPORT | {"command": here}).content
    for secret in (os.getcwd(), str(Path.home()), socket.gethostname()):
        assert len(secret) < 2 or secret not in content
    assert not re.search(rf"(?<!\w){re.escape(getpass.getuser())}(?!\w)", content)


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
    assert shown == card_from_report(report), "run `make cards`"
    if plot := report["card"].get("plot"):
        assert (folder / plot).is_file() and f"]({plot})" in shown


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_the_numbers_of_a_shipped_card_are_those_of_the_run(folder):
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    run = json.loads((ROOT / "docs" / "quickstart" / "seed0.json").read_text(encoding="utf-8"))
    assert {name: report[name] for name in run} == run


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_the_metadata_of_a_shipped_card_is_valid(folder):
    data = ModelCard.load(folder / "README.md").data
    again = ModelCardData(**yaml.safe_load(data.to_yaml()))
    assert again.to_dict() == data.to_dict() and data.eval_results and data.base_model == BASE


def test_there_is_a_card_for_every_stage():
    assert [path.name for path in SHIPPED] == ["quickstart-ppo", "quickstart-reward", "quickstart-sft"]


# --- what a merged model and the next round say ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_says_so(card, kind):
    made = card(kind, relation="merge", repo_id="a/merged")
    assert made.data.base_model_relation == "merge" and made.data.library_name == "transformers"
    assert "lora" not in made.data.tags and "merged into" in made.text and "peft" not in made.text.split("## Limits")[0]


def test_lineage_links_what_is_on_the_hub_and_escapes_the_rest(card):
    lineage = {"SFT policy": "alice/sft@abc123", "prompts": "datasets/a/b", "pairs": "local *x*.jsonl (sha256 12)"}
    text = card("policy", lineage=lineage, report=REPORT | {"seconds": {"ppo": 7200}}).text
    assert "- SFT policy: [alice/sft@abc123](https://huggingface.co/alice/sft/tree/abc123)" in text
    assert "- prompts: [datasets/a/b](https://huggingface.co/datasets/a/b)" in text
    assert r"local \*x\*.jsonl \(sha256 12\)" in text and "in 2.0 hours" in text


def test_a_report_without_card_options_has_no_card():
    assert card_from_report(REPORT) is None
    assert "kl" in card_from_report(REPORT | {"card": {"kind": "policy"}}, repo_id="a/b").lower()
