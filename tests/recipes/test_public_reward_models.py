"""The starter configs with public reward models: they parse, and their models are what the library can score with.

No file of these models is here. Their shapes are facts of the configs of `meta-llama/Llama-3.2-1B-Instruct`,
`Llama-3.2-3B-Instruct` and `Llama-3.1-8B-Instruct`, on which their cards say that they are built; the template is TRL's
copy of Llama's.
"""

import re
from pathlib import Path

import pytest
import torch
import trl
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
)

from hf_rlhf_ext.cli.options import machine_defaults
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.cli.shipped import find_config
from hf_rlhf_ext.data.text import encode_completion, encode_prompt
from hf_rlhf_ext.ppo.rewards import RewardFunctions
from hf_rlhf_ext.recipes.ppo import ARGUMENTS, RewardArguments
from hf_rlhf_ext.reward.scorer import RewardScorer

FOLDER = Path(__file__).parents[2] / "recipes" / "configs" / "public-reward-models"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "num_labels": 1}
SHAPES = {  # hidden size, size of the MLP, layers, heads
    "Skywork/Skywork-Reward-V2-Llama-3.2-1B": (2048, 8192, 16, 32),
    "Skywork/Skywork-Reward-V2-Llama-3.2-3B": (3072, 8192, 28, 24),
    "allenai/Llama-3.1-8B-Instruct-RM-RB2": (4096, 14336, 32, 32),
}
QWEN = Qwen2Config(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
PROMPT = [{"role": "user", "content": "Say hello."}]
ANSWER = [{"role": "assistant", "content": "Hello, my friend."}]


def llama_config(name, **changes):
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return LlamaConfig(**LLAMA | dict(zip(sizes, SHAPES[name], strict=True)) | changes)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_yaml_parses_and_every_value_arrives(path):
    assert find_config(f"public-reward-models/{path.name}") == path
    parsed = parse_recipe(ARGUMENTS, ["--config", str(path)], defaults=machine_defaults())
    given = yaml.safe_load(path.read_text())
    for key, value in given.items():
        (owner,) = [arguments for arguments in parsed if hasattr(arguments, key)]
        found = getattr(owner, key)
        found = getattr(found, "value", found)  # enumerations
        assert found == ([] if key == "report_to" else value), key
    (rewards,) = [arguments for arguments in parsed if isinstance(arguments, RewardArguments)]
    assert rewards.load() == given["reward_model"] and not given.keys() & {"bf16", "use_cpu", "trust_remote_code"}
    (model,) = given["reward_model"]
    assert model in SHAPES


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_memory_in_the_comment_is_what_the_shapes_give(path):
    text = path.read_text()
    (name,) = yaml.safe_load(text)["reward_model"]
    with torch.device("meta"):
        reward = AutoModelForSequenceClassification.from_config(llama_config(name))
        policy = AutoModelForCausalLM.from_config(QWEN)
    assert reward.num_labels == 1
    sizes = [2 * sum(weight.numel() for weight in model.parameters()) / 1e9 for model in (reward, policy)]
    found = re.search(r"Reward model ([\d.]+) GB in bf16, policy ([\d.]+) GB", text).groups()
    assert [float(number) for number in found] == [round(size, 2) for size in sizes]


@pytest.fixture
def llama_tokenizer(chat_tokenizer):
    """A tokenizer with Llama's chat template and stop token, as all of these models have them."""
    chat_tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "llama3_2.jinja").read_text()
    chat_tokenizer.add_special_tokens({"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"})
    return chat_tokenizer


def test_a_conversation_is_tokenized_as_in_the_models_own_example(llama_tokenizer):
    """Their cards pass the whole conversation through the chat template: the same tokens, the stop token the last."""
    expected = llama_tokenizer.apply_chat_template(PROMPT + ANSWER, tokenize=True, return_dict=False)
    ids = encode_prompt(llama_tokenizer, PROMPT, {}) + encode_completion(llama_tokenizer, PROMPT, ANSWER, {})
    assert ids == expected and ids[-1] == llama_tokenizer.eos_token_id


def test_scores_are_those_of_the_models_own_example(llama_tokenizer):
    """A small model of the same class: logits of Transformers on the whole conversation, and our scorer's."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    name = "Skywork/Skywork-Reward-V2-Llama-3.2-1B"
    config = llama_config(
        name, **sizes, num_key_value_heads=2, vocab_size=len(llama_tokenizer), pad_token_id=llama_tokenizer.pad_token_id
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    ids = llama_tokenizer.apply_chat_template(PROMPT + ANSWER, tokenize=True, return_dict=False)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits.item()
    (score,) = RewardFunctions(RewardScorer(model, llama_tokenizer)).score([PROMPT], [ANSWER]).sequence.tolist()
    assert score == pytest.approx(expected, abs=1e-5)
