import getpass
import json
import math
import os
import re
import socket
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, ModelCardData
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer, load_base_model
from hf_rlhf_ext.data.schema import LoadReport
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.card import KINDS, card_from_report, escape_markdown, render_card, write_card
from hf_rlhf_ext.hub.privacy import COMMON_NAMES, strip_local_paths
from hf_rlhf_ext.hub.report import RunReport, base_precision, trainer_report
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
    own_tag = {"policy": "ppo", "dpo": "dpo", "reward_model": "reward-model", "sft": "sft"}[kind]
    assert own_tag in data["tags"]


def test_results_carry_n_and_interval_in_the_table_and_in_the_model_index(card):
    reward = card("reward_model")
    results = {result.metric_type: result for result in reward.data.eval_results}
    assert results["accuracy"].metric_value == pytest.approx(0.7812, abs=1e-4)
    # Ties have no winner.
    assert results["accuracy"].metric_name == "Pairwise accuracy (n = 160, 95 % CI 0.720 to 0.840)"
    assert results["nll"].metric_name.endswith(" (n = 180)")
    assert {result.dataset_name for result in results.values()} == {"held-out pairs of the run"}
    assert "| Pairwise accuracy | 0.781 | 0.720 to 0.840 | 160 |" in reward.text
    assert "180 pairs of 30 prompts were held out; accuracy is measured on the 160 pairs without a tie." in reward.text
    policy = card("policy")
    assert "| Gain in gold reward | 0.551 | 0.450 to 0.640 | 16 |" in policy.text
    assert "8.9 nats of KL per completion (β = 0.05)" in policy.text
    assert "| chat | 12 | 0.200 | 0.125 |" in policy.text
    sft = [result.metric_type for result in card("sft").data.eval_results]
    assert sft == ["gold_before", "proxy_before", "mean_length_before"]


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
    rows = ["| Gain in proxy reward | 1.000 | 0.800 to 1.200 | 24 |", "completion | 3.500 | 3.000 to 4.000 | 24 |"]
    rows += [r"| Gain in reward a\_judge, unseen by PPO | -0.100 | -0.200 to 0.100 | 24 |"]
    assert all(row in text for row in rows)
    assert "Proxy reward changed from -0.100 to 0.900, in 8 updates, at 3.5 nats of KL per completion (β = 0.05)." in (
        text.replace(r"A\_judge reward changed from 0.400 to 0.300, proxy", "Proxy")
    )
    limits = text.split("## Limits")[1]
    assert r"Reward a\_judge, which PPO did not use, decreased by 0.100" in limits
    assert r"A guard stopped training early: KL is 9.1 nats, above max\_kl = 8 &lt;b&gt;" in limits


def test_an_sft_recipes_card_shows_its_loss(card):
    sft = {"eval_loss": 1.25, "eval_mean_token_accuracy": 0.75, "heldout_rows": 40, "train_loss": 0.5}
    made = card("sft", {"sft": sft})
    assert "| Loss, nats per token | 1.250 | – | 40 |" in made.text
    assert "| Accuracy of the next token | 0.750 | – | 40 |" in made.text
    assert made.data.eval_results[0].dataset_name == "held-out demonstrations of the run"


def test_a_reward_models_length_bias_and_gain_are_in_its_card(card):
    gaps = {"0 to 2": {"n": 20, "accuracy": 0.55}, "2 to 9": {"n": 21, "accuracy": 0.7}}
    gaps |= {"9 to 40": {"n": 22, "accuracy": 0.9}}
    measured = REPORT["reward_model"] | {"groups": {"length_gap": gaps, "a|b": {"<c>": {"n": 1, "accuracy": 1.0}}}}
    measured |= {"gain": 0.259, "gain_ci95": [-0.1, 0.4], "brier": 0.15, "ece": 0.05}
    text = card("reward_model", {"reward_model": measured}).text
    assert "accuracy is 0.550 (n = 20) if both completions have a similar length (0 to 2 tokens apart)" in text
    assert "may be chance" in text and "| Expected calibration error | 0.050 | – | 180 |" in text
    assert "| Gain in accuracy over preferring the longer completion | 0.259 | -0.100 to 0.400 | 160 |" in text
    assert r"| a\|b | &lt;c&gt; |" in text


def test_an_ensemble_names_its_members(card):
    ensemble = {"pairs": 9, "accuracy": 0.7, "disagreement": 0.25, "combine": "min"}
    ensemble |= {"members": [{"accuracy": 0.6, "nll": 0.61}, {"pairs": 9}]}
    made = card("reward_model", {"reward_model": ensemble}, repo_id="alice/both")
    assert "ensemble of 2" in made.text and "(combined by min)" in made.text
    assert "| 0 | 0.600 | 0.610 |" in made.text and "| 1 | – | – |" in made.text
    assert "standard deviation of their rewards | 0.250 |" in made.text
    assert 'RewardEnsemble.from_pretrained("alice/both")' in made.text and "AutoModel" not in made.text
    assert made.data.library_name == "hf_rlhf_ext"


def test_results_name_the_data_set_and_its_commit(card):
    made = card("policy", datasets=["alice/prompts"], dataset_revision="abc123")
    found = made.data.eval_results[0]
    assert (found.dataset_type, found.dataset_revision) == ("alice/prompts", "abc123")
    assert made.data.datasets == ["alice/prompts"]
    assert card("policy").data.eval_results[0].dataset_revision is None


def test_what_is_not_published_says_so_and_the_snippet_has_the_system_prompt(card):
    made = card("policy", repo_id="runs/quickstart/policy", system_prompt='Say "hi".').text
    assert "No weights are published with this card." in made and "the folder `runs/quickstart/policy`" in made
    (snippet,) = re.findall(r"```python\n(.*?)```", made, re.DOTALL)
    compile(snippet, "snippet", "exec")
    assert r'{"role": "system", "content": "Say \"hi\"."}' in snippet
    assert "No weights" not in card("policy", repo_id="alice/policy").text


@pytest.mark.parametrize(
    "architecture, base_options, bf16",
    [
        ("llama", {"dtype": "float32"}, False),
        ("llama", {"dtype": "bfloat16"}, False),
        ("llama", {"dtype": "bfloat16"}, True),
        ("llama", {"dtype": "bfloat16", "load_in_4bit": True}, False),
        ("llama", {"dtype": "float32", "quantization_config": {"load_in_4bit": True}}, False),  # FP4
        ("llama", {"dtype": "float32", "quantization_config": {"load_in_8bit": True}}, False),
        ("gpt2", {"dtype": "float32"}, False),
        ("gpt2", {"dtype": "float32"}, True),
        ("gpt2", {"dtype": "bfloat16"}, False),
        ("bert", {"dtype": "float32"}, False),
        ("bert", {"dtype": "bfloat16"}, True),  # encoders are always fp32
    ],
    ids=str,
)
def test_the_snippet_s_plain_score_is_the_scorer_s(
    architecture, base_options, bf16, chat_tokenizer, tmp_path, capsys, monkeypatch
):
    """Adapters of decoders (with and without a chat template) and of an encoder: the card shows how to score them.

    The base is stored in fp32; the snippet loads it as it was in training, whatever dtype this machine prefers.
    """
    torch.manual_seed(0)
    quantized = not {"load_in_4bit", "quantization_config"}.isdisjoint(base_options)
    width = 128 if quantized else 32  # blocks of NF4 hold 64 weights
    small = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(chat_tokenizer)}
    small |= {"pad_token_id": chat_tokenizer.pad_token_id, "max_position_embeddings": 128}
    if architecture == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**small, intermediate_size=128))
    elif architecture == "gpt2":
        model, chat_tokenizer.chat_template = hf.GPT2LMHeadModel(hf.GPT2Config(**small)), None
    else:
        model = hf.BertModel(hf.BertConfig(**small, intermediate_size=48))
        chat_tokenizer.cls_token = chat_tokenizer.sep_token = chat_tokenizer.eos_token
        chat_tokenizer.chat_template = None  # the library has a default template for encoders
    for part in (model, chat_tokenizer):
        part.save_pretrained(tmp_path / "base")
    plain = [{"prompt": f"Tell {k}:", "chosen": "a happy day", "rejected": "no"} for k in range(4)]
    args = BradleyTerryConfig(str(tmp_path / "reward"), use_cpu=True, bf16=bf16, report_to="none", max_steps=2)
    args.model_init_kwargs = base_options
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = BradleyTerryTrainer(str(tmp_path / "base"), args, Dataset.from_list(plain), peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    report = trainer_report(trainer)
    trained = "float32" if architecture == "bert" else base_options["dtype"]
    assert report.card.base_dtype == trainer.normalization.base_dtype == trained
    assert report.card.load_in_4bit == trainer.normalization.load_in_4bit == ("load_in_4bit" in str(base_options))
    assert report.card.quantization == trainer.normalization.quantization
    monkeypatch.chdir(tmp_path)
    text = card_from_report(report, base_model=str(tmp_path / "base"), repo_id="./reward")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    capsys.readouterr()
    exec(snippet, {})
    scored, alone = capsys.readouterr().out.splitlines()
    raw = float(re.findall(r"-?\d[\d.e-]*", scored)[1])
    # bitsandbytes computes with other kernels on CPUs with bf16 instructions, which the library switches off.
    tolerance = 0.01 * abs(raw) if quantized else 1e-5
    assert float(alone) == pytest.approx(raw, abs=tolerance) and abs(raw) > 1e-4
    assert ("BitsAndBytesConfig" in snippet) == quantized


@pytest.mark.parametrize("kind", KINDS)
def test_the_snippet_loads_the_base_as_it_was_in_training(card, kind):
    def loading(**options):
        (snippet,) = re.findall(r"```python\n(.*?)```", card(kind, **options).text, re.DOTALL)
        compile(snippet, kind, "exec")
        (line,) = [line for line in snippet.splitlines() if f'from_pretrained("{BASE}"' in line]
        return line.partition(f'"{BASE}"')[2]

    usual = loading()  # a report without this information
    assert "dtype" not in usual and "quantization" not in usual
    assert loading(base_dtype="bfloat16") == usual.replace(")", ', dtype="bfloat16")')
    assert loading(base_dtype="bfloat16", load_in_4bit=True).endswith('dtype="bfloat16", quantization_config=four_bit)')
    assert loading(config={"load_in_4bit": True}).endswith("quantization_config=four_bit)")  # from an older recipe
    eight = {"load_in_8bit": True, "llm_int8_threshold": 5.0}
    assert loading(base_dtype="float16", quantization=eight).endswith('"float16", quantization_config=eight_bit)')
    made = card(kind, quantization=eight).text
    assert "llm_int8_threshold=5.0," in made and "8 bits" in made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_snippet_s_policy_is_the_one_that_was_trained(dtype, tiny_llama, chat_tokenizer, tmp_path, monkeypatch):
    """The base is stored in fp32, and the machine may prefer either."""
    for part in (tiny_llama, chat_tokenizer):
        part.save_pretrained(tmp_path / "base")
    model = load_base_model(str(tmp_path / "base"), dtype=dtype)
    torch.manual_seed(1)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    policy = get_peft_model(model, lora)
    policy.save_pretrained(tmp_path / "policy")
    chat_tokenizer.save_pretrained(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    options = {"base_model": str(tmp_path / "base"), "repo_id": "./policy", **base_precision(policy)}
    (snippet,) = re.findall(r"```python\n(.*?)```", render_card("policy", {"ppo": {}}, **options), re.DOTALL)
    names = {}
    exec(snippet, names)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(names["model"].eval()(ids).logits, policy.eval()(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_that_its_base_was_in_4_bits(card, kind):
    made = card(kind, load_in_4bit=True).text
    assert "bitsandbytes`" in made and "4 bits" in made.split("## Limits")[1] and "2305.14314" in made
    merged = card(kind, load_in_4bit=True, relation="merge").text
    assert "4 bits" in merged.split("## Limits")[1] and "BitsAndBytesConfig" not in merged
    assert "4 bits" not in card(kind, base_dtype="float32").text


def test_a_reward_model_s_folder_knows_the_precision_of_its_base(card, tmp_path):
    (tmp_path / "reward_model").mkdir()
    RewardNormalization(base_dtype="bfloat16", autocast="bfloat16").save(tmp_path / "reward_model")
    assert 'num_labels=1, dtype="bfloat16")' in card("reward_model").text
    assert 'torch.autocast("cpu", torch.bfloat16)' in card("reward_model").text
    RunReport.from_dict(REPORT | {"card": {"kind": "reward_model"}}).save(tmp_path / "reward_model")
    assert RunReport.load(tmp_path / "reward_model").card.base_dtype == "bfloat16"
    RewardNormalization().save(tmp_path / "reward_model")  # "auto": not known
    assert "dtype=" not in card("reward_model").text


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
    for shown in ("DPO policy", "starting from the SFT policy", "40 judged pairs (β = 0.1)", "from 9.0 to 8.0 tokens"):
        assert shown in made.text
    assert "| KL to the initial policy, nats per completion | 1.500 | 1.000 to 2.000 | 24 |" in made.text
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
        options |= {"repo_id": "alice/x", "base_model": f"base {text}", "system_prompt": text}
        made = card(kind, report, **options)
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(made.text)
        inline = [child.type for token in tokens for child in token.children or ()]
        snippet = next(token.content for token in tokens if token.info == "python")
        compile(snippet, "snippet", "exec")
        assert yaml.safe_load(made.data.to_yaml())["base_model"] == f"base {text}"
        return [t.type for t in tokens], [t for t in inline if t not in ("text", "text_special", "softbreak")]

    assert shape(evil) == shape("plain")


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
    content = card(kind, report, config=config, model_name="zelda77-model", limits=[f"Made in {machine}."]).content
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
    assert shown == card_from_report(report), "run `make cards`"
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
    assert "lora" not in made.data.tags and "merged into" in made.text and "peft" not in made.text.split("## Limits")[0]


def test_lineage_links_what_is_on_the_hub_and_escapes_the_rest(card):
    lineage = {"SFT policy": "alice/sft@abc123", "prompts": "datasets/a/b", "pairs": "local *x*.jsonl (sha256 12)"}
    report = REPORT | {"seconds": {"sft": 90, "ppo": 7200}}
    text = card("policy", lineage=lineage, report=report).text
    assert "- SFT policy: [alice/sft@abc123](https://huggingface.co/alice/sft/tree/abc123)" in text
    assert "- prompts: [datasets/a/b](https://huggingface.co/datasets/a/b)" in text
    assert r"local \*x\*.jsonl \(sha256 12\)" in text
    assert "this stage took 2.0 hours" in text and "this stage took 1.5 minutes" in card("sft", report).text


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
    options |= {"gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True}
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


@pytest.mark.parametrize("kind", ["reward_model", "sft"])
def test_the_card_says_which_rows_and_columns_were_read(kind):
    read = LoadReport("/home/jane/pairs.csv", 3, 2, {"chosen is not text": [1]}, unread={"system": "text, ignored"})
    card = render_card(kind, {}, rows_read=[read.summary()])
    (line,) = [line for line in card.splitlines() if "rows kept" in line]
    assert "2 of 3 rows kept" in line and "dropped: chosen is not text" in line and "not read: system" in line
    assert "jane" not in card
    assert "columns read" not in render_card(kind, {})
