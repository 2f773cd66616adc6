"""Whatever is trained and pushed, in whatever way: the code on its card gives the outputs of the trainer.

Every run is pushed to the stand-in, and a new process that knows the stand-in alone runs the code blocks of its card,
read from there. What a block generates or scores is compared with the trained model in the trainer, to the precision in
which it was trained (`Run.tolerance`).

`make test` trains a part in which every pair of values of `AXES` occurs. RLHF_FULL_MATRIX=1 trains all combinations,
and RLHF_MATRIX=REGEX those whose names match.
"""

import json
import os
import re
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download

from hf_rlhf_ext import RewardEnsemble
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.merge import merge_run
from tests.hub import matrix_blocks
from tests.hub.matrix_runs import (
    ANSWER,
    AXES,
    IMPOSSIBLE,
    PROBES,
    Run,
    Trained,
    Workshop,
    covering,
    make_trainer,
    possible_runs,
    push_base,
)

CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
TURN = "<|im_start|>"
"""What the chat template puts before every message."""


def chosen_runs() -> list[Run]:
    runs = possible_runs()
    if pattern := os.environ.get("RLHF_MATRIX"):
        return [run for run in runs if re.search(pattern, run.name)]
    return runs if os.environ.get("RLHF_FULL_MATRIX") == "1" else covering(runs)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # of all combinations
def test_the_code_on_a_card_gives_the_outputs_of_the_trainer(
    hub, elsewhere, chat_tokenizer, recipes_path, tmp_path, monkeypatch, subtests
):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    push_base(chat_tokenizer, tmp_path / "base")
    workshop = Workshop(tmp_path, recipes_path, monkeypatch)
    published: dict[Run, tuple[Trained, list[str]]] = {}
    for run in chosen_runs():
        with subtests.test(f"{run.name}: published"):
            trained = workshop.publish(run)
            published[run] = trained, blocks_of(run)
    results = run_blocks(published, elsewhere, tmp_path)
    for run, (trained, blocks) in published.items():
        for index in range(len(blocks)):
            with subtests.test(f"{run.name}: block {index}"):
                example = results[run.name, len(blocks) - 1]["example"]  # every card ends with code of this library
                check(run, trained, results[run.name, index], example)
    complete = [run for run, (_, blocks) in published.items() if len(blocks) == 3]  # a sample, as each takes seconds
    for run in complete[:1]:
        for index, block in enumerate(published[run][1]):
            with subtests.test(f"{run.name}: block {index} in a process of its own"):
                assert elsewhere(block).stdout == results[run.name, index]["printed"]


def blocks_of(run: Run) -> list[str]:
    """The Python blocks of the card, as it is on the stand-in."""
    card = Path(hf_hub_download(run.repo_id, "README.md", revision=run.branch)).read_text(encoding="utf-8")
    blocks = CODE.findall(card)
    assert blocks, f"the card of {run.repo_id} has no code"
    return blocks


def run_blocks(published: dict[Run, tuple[Trained, list[str]]], elsewhere, folder: Path) -> dict:
    """Runs all blocks, 30 cards in a process. The results are by name of the run and number of the block."""
    cards = {run.name: {"blocks": blocks, "probes": probes(trained)} for run, (trained, blocks) in published.items()}
    results = {}
    names = list(cards)
    for start in range(0, len(names), 30):
        (folder / "cards.json").write_text(json.dumps({name: cards[name] for name in names[start : start + 30]}))
        elsewhere("", matrix_blocks.__file__, folder / "cards.json", folder / "results.pt")
        results |= torch.load(folder / "results.pt", weights_only=False)
    return results


def probes(trained: Trained) -> list[list[int]]:
    """Tokens of texts in the form of training. In another one, rounding moves the score of a bf16 model by far more."""
    tokenizer = trained.tokenizer
    texts = PROBES
    if trained.run.form == "chat":
        turns = [[{"role": "user", "content": text}] for text in PROBES]
        texts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    return [[*tokenizer(text + ANSWER)["input_ids"], tokenizer.eos_token_id] for text in texts]


# What a block must do


def check(run: Run, trained: Trained, result: dict, example: list) -> None:
    assert result["error"] is None, result["code"] + result["error"]
    if "is_quantized" in result:
        assert result["is_quantized"] == (run.weights == "4-bit")
    if run.is_reward_model:
        check_scores(run, trained, result, trained.scores(*example))
    else:
        check_policy(run, trained, result)


def check_policy(run: Run, trained: Trained, result: dict) -> None:
    """The logits are the trainer's, the prompt has the form of training, and the text is what it generates greedily."""
    for ids, logits in zip(probes(trained), result["logits"], strict=True):
        expected = trained.logits(ids)
        check_outputs(run, logits, expected)
        if trained.is_adapter:
            check_adapter_matters(run, trained.logits(ids, with_adapter=False), expected)
    assert result["generated"], f"generates nothing:\n{result['code']}"
    for prompt, output in result["generated"]:
        check_form(run, trained, prompt)
        assert output[: len(prompt)] == prompt
        logits = trained.logits(output)
        for position in range(len(prompt), len(output)):
            scores = logits[position - 1]
            lost = (scores.max() - scores[output[position]]).item()
            assert lost <= run.tolerance * scores.abs().max(), f"token {position} is not what the trainer chooses"
        text = trained.tokenizer.decode(output[len(prompt) :], skip_special_tokens=True)
        assert text.strip() in result["printed"].replace("\\n", "\n"), (text, result["printed"])


def check_scores(run: Run, trained: Trained, result: dict, expected: tuple[float, float]) -> None:
    """Every number that is printed is the trainer's score or reward of the example, and this library prints both."""
    for ids, _ in result["scored"]:
        check_form(run, trained, ids)
        assert ids[-1] == trained.tokenizer.eos_token_id, "the score is read at the stop token"
    if matrix_blocks.LIBRARY not in result["code"]:  # whose scorers are no classifiers, and print what they compute
        sequences = probes(trained)
        check_outputs(run, torch.stack(result["logits"]).flatten(), trained.score_ids(sequences))
        if trained.is_adapter:
            check_adapter_matters(run, trained.score_ids(sequences, with_adapter=False), trained.score_ids(sequences))
    printed = [float(number) for number in NUMBER.findall(result["printed"])]
    assert printed, f"prints no number: {result['printed']!r}"
    tolerance = allowed(run, torch.tensor(expected))
    assert all(min(abs(number - value) for value in expected) <= tolerance for number in printed), (printed, expected)
    if matrix_blocks.LIBRARY in result["code"]:
        assert all(min(abs(number - value) for number in printed) <= tolerance for value in expected), (
            printed,
            expected,
        )


def check_outputs(run: Run, given: torch.Tensor, trained: torch.Tensor) -> None:
    difference = (given - trained).abs().max()
    assert difference <= allowed(run, trained), f"outputs differ by {difference:.2g}, where the largest is {trained}"


def check_adapter_matters(run: Run, untrained: torch.Tensor, trained: torch.Tensor) -> None:
    """Otherwise this test could not see that code leaves the adapter out."""
    difference = (untrained - trained).abs().max()
    assert difference > 2 * allowed(run, trained), "the adapter changes too little for this test"


def allowed(run: Run, trained: torch.Tensor) -> float:
    """The largest difference that rounding explains. A score is the sum of parts that are often larger than itself."""
    return run.tolerance * max(1.0, trained.abs().max().item())


def check_form(run: Run, trained: Trained, ids: list[int]) -> None:
    text = trained.tokenizer.decode(ids)
    assert (TURN in text) == (run.form == "chat"), f"the prompt has another form than in training: {text!r}"


# What there is no model for


@pytest.mark.parametrize("kind", ["sft", "pairs", "ppo-head"])
def test_a_whole_model_in_4_bits_is_refused(kind, tiny_llama, chat_tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = save_base(tiny_llama, chat_tokenizer, tmp_path)
    with pytest.raises(UserError, match="quantized.*(adapter|peft_config)") as refusal:
        make_trainer(Run(kind, "whole in 4-bit", "text", "python"), tmp_path / "run", base=base).train()
    assert "\n" not in str(refusal.value)


def test_a_critic_adapter_of_a_whole_model_is_refused(tiny_llama, chat_tokenizer, tmp_path):
    base = save_base(tiny_llama, chat_tokenizer, tmp_path)
    with pytest.raises(UserError, match="critic='adapter' needs a policy that is an adapter"):
        make_trainer(Run("ppo-adapter", "whole", "text", "python"), tmp_path / "run", base=base)


def test_a_merge_of_an_ensemble_is_refused(tmp_path):
    (tmp_path / "member-0").mkdir()
    RewardEnsemble.save(tmp_path, ["member-0"])
    with pytest.raises(UserError, match="ensemble, whose members are merged one by one"):
        merge_run(tmp_path, tmp_path / "merged")


def save_base(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def test_every_pair_of_values_is_in_the_part_that_make_test_trains():
    runs = possible_runs()
    part = covering(runs)
    assert len(part) < len(runs) / 3
    for first, second in combinations(AXES, 2):
        for values in product(AXES[first], AXES[second]):
            if (first, second) == ("kind", "weights") and values in IMPOSSIBLE:
                continue
            assert any((getattr(run, first), getattr(run, second)) == values for run in part), values
