"""What a reward model is asked: one pair or lists, and in the form of its training."""

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig

from hf_rlhf_ext import PPOConfig, PPOTrainer, RewardEnsemble, RewardScorer, UserError
from hf_rlhf_ext.data.prompt_form import PROMPT_FORM_FILE, PromptForm, template_digest
from hf_rlhf_ext.data.tokenization import longest, tokenize_row
from hf_rlhf_ext.ppo.rewards import RewardFunctions
from hf_rlhf_ext.quality.reward_check import fitting, within
from hf_rlhf_ext.reward.asked import FormOfTraining, as_lists
from hf_rlhf_ext.reward.ensemble import load_reward
from hf_rlhf_ext.reward.export import export_merged

PROMPTS = ["Tell me about rain.", "What is a fox?"]
COMPLETIONS = ["Rain waters the garden.", "An animal"]


def asked(text):
    return [{"role": "user", "content": text}]


def answered(text):
    return [{"role": "assistant", "content": text}]


def comparisons(form):
    prompt, answer = (asked, answered) if form == "messages" else (str, str)
    rows = [
        {"prompt": prompt(f"day {k}"), "chosen": answer("happy" + "!" * k), "rejected": answer("sad")} for k in range(4)
    ]
    return Dataset.from_list(rows)


AS_MESSAGES = list(map(asked, PROMPTS)), list(map(answered, COMPLETIONS))


@pytest.fixture(scope="module")
def pairs_of_a_module():
    return {form: comparisons(form) for form in ("text", "messages")}


@pytest.fixture
def trained(make_trainer, tiny_llama, chat_tokenizer, tmp_path, pairs_of_a_module):
    """Folders of reward models that were trained on each form, on one base, and that base's folder."""
    from hf_rlhf_ext import load_base_model

    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")

    def folder(form, name="rm", model=None, peft="lora", **options):
        model = load_base_model(tmp_path / "base", task="reward", dtype="float32") if model is None else model
        trainer = make_trainer(pairs_of_a_module[form], model=model, folder=name, max_steps=1, peft=peft, **options)
        trainer.train()
        trainer.save_model()
        return tmp_path / name

    return folder


def lines(caplog, *words):
    return [record.getMessage() for record in caplog.records if all(word in record.getMessage() for word in words)]


def test_text_is_scored_as_the_messages_of_training_and_it_is_said_once(trained, caplog):
    folder = trained("messages")
    scorer = RewardScorer.from_pretrained(folder)
    assert scorer.form == "messages"
    expected = scorer(*AS_MESSAGES)
    assert not lines(caplog, "was trained on")
    assert scorer(PROMPTS, COMPLETIONS) == expected
    assert scorer.raw(PROMPTS, COMPLETIONS) == scorer.raw(*AS_MESSAGES)
    assert scorer.text(PROMPTS[0], COMPLETIONS[0]) == scorer.text(asked(PROMPTS[0]), answered(COMPLETIONS[0]))
    (said,) = lines(caplog, "was trained on messages and gets text")
    assert str(folder) in said
    # One side may be messages already.
    assert scorer(PROMPTS, AS_MESSAGES[1]) == expected

    # An older folder has no record, and nothing is guessed.
    (folder / PROMPT_FORM_FILE).unlink()
    caplog.clear()
    older = RewardScorer.from_pretrained(folder)
    assert older.form is None
    assert older(*AS_MESSAGES) == expected
    assert older(PROMPTS, COMPLETIONS) != pytest.approx(expected)
    assert not lines(caplog, "was trained on")


def test_messages_for_a_model_of_text_are_said_once(trained, caplog):
    scorer = RewardScorer.from_pretrained(trained("text"))
    assert scorer.form == "text"
    scorer(PROMPTS, COMPLETIONS)
    assert not lines(caplog, "was trained on")
    scorer(*AS_MESSAGES)
    scorer(*AS_MESSAGES)
    assert len(lines(caplog, "was trained on text and gets messages")) == 1
    scorer.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        scorer(*AS_MESSAGES)


def test_another_template_than_that_of_training_is_said_once(trained, caplog):
    scorer = RewardScorer.from_pretrained(trained("messages"))
    scorer.tokenizer.chat_template = "{# other #}" + scorer.tokenizer.chat_template
    scorer(*AS_MESSAGES)
    scorer(PROMPTS, COMPLETIONS)
    assert len(lines(caplog, "another chat template")) == 1
    scorer.tokenizer.chat_template = None
    with pytest.raises(UserError, match="tokenizer of its folder"):
        scorer(PROMPTS, COMPLETIONS)


def test_prompts_that_a_template_has_rendered_are_not_rendered_twice(trained):
    scorer = RewardScorer.from_pretrained(trained("messages"))
    rendered = [
        scorer.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in AS_MESSAGES[0]
    ]
    assert scorer(rendered, COMPLETIONS) == scorer(*AS_MESSAGES)


def test_a_begun_answer_is_continued_in_every_form(trained):
    scorer = RewardScorer.from_pretrained(trained("messages"))
    begun = [*asked("Why?"), *answered("Sure,")]
    assert scorer([begun], [" it is."]) == scorer([asked("Why?")], [answered("Sure, it is.")])
    rendered = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSure,"
    assert scorer([rendered], [" it is."]) == scorer([asked("Why?")], [answered("Sure, it is.")])


def test_members_of_an_ensemble_say_it_once(trained, tmp_path, caplog):
    folders = [trained("messages", f"member-{k}", seed=k) for k in range(2)]
    ensemble = RewardEnsemble.from_pretrained(folders)
    assert ensemble.form == "messages"
    assert ensemble.members[0].model is ensemble.members[1].model  # one base
    assert ensemble(PROMPTS, COMPLETIONS) == ensemble(*AS_MESSAGES)
    assert len(lines(caplog, "gets text")) == 1
    assert ensemble(PROMPTS[0], COMPLETIONS[0]) == pytest.approx(ensemble(PROMPTS, COMPLETIONS)[:1], abs=1e-5)
    assert np.allclose(ensemble.raw("Why?", "So."), ensemble.raw(["Why?"], ["So."]))

    RewardEnsemble.save(tmp_path, ["member-0", "member-1"])
    assert load_reward(tmp_path).form == "messages"
    PromptForm("text").save(folders[1])
    assert load_reward(tmp_path).form is None


def test_a_model_that_is_trained_further_on_the_other_form_is_mixed(trained, tmp_path, caplog):
    folder = trained("messages")
    again = trained("text", "again", model=str(folder), peft=None)
    scorer = RewardScorer.from_pretrained(again)
    assert scorer.form == "mixed"
    assert scorer(PROMPTS, COMPLETIONS) != pytest.approx(scorer(*AS_MESSAGES))
    assert not lines(caplog, "was trained on")


def test_a_merged_reward_model_keeps_the_form(trained, tmp_path, caplog, chat_tokenizer):
    folder = trained("messages")
    export_merged(folder, tmp_path / "merged")
    assert not lines(caplog, "was trained on")  # the texts of its own comparison are no question of the user
    merged = RewardScorer.from_pretrained(tmp_path / "merged")
    assert PromptForm.load(tmp_path / "merged") == PromptForm("messages", template_digest(chat_tokenizer))
    assert merged(PROMPTS, COMPLETIONS) == merged(*AS_MESSAGES)


def test_a_model_in_memory_is_asked_as_it_was_trained(make_trainer, pairs_of_a_module, chat_tokenizer):
    trainer = make_trainer(pairs_of_a_module["messages"], max_steps=1)
    scorer = RewardScorer(trainer.model, chat_tokenizer)
    assert scorer.form == "messages"
    assert scorer(PROMPTS, COMPLETIONS) == scorer(*AS_MESSAGES)


@pytest.mark.parametrize("shared", [True, False])
def test_ppo_on_text_scores_with_the_template(trained, tmp_path, chat_tokenizer, caplog, shared):
    from transformers import AutoModelForCausalLM

    folder = trained("messages")
    alone = RewardScorer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    args = PPOConfig(
        output_dir=str(tmp_path / "ppo"), max_steps=1, num_ppo_epochs=1, max_completion_length=4, use_cpu=True,
        bf16=False, report_to="none", per_device_train_batch_size=4, activation_checkpointing=False, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": text} for text in PROMPTS * 2])
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    reward = folder if shared else alone
    trainer = PPOTrainer(base, reward, args, prompts, processing_class=chat_tokenizer, peft_config=lora)
    (function,) = trainer.rewards.funcs
    assert (function.head is not None) == shared and function.form == "messages"
    assert function(PROMPTS, COMPLETIONS) == pytest.approx(alone(*AS_MESSAGES), abs=1e-4)
    rows = trainer.sample_and_score(prompts)
    again = alone([asked(row.prompt) for row in rows], [answered(row.completion) for row in rows])
    assert [row.score for row in rows] == pytest.approx(again, abs=1e-4)
    assert len(lines(caplog, "was trained on messages and gets text")) == 1
    trainer.save_model()
    assert PromptForm.load(tmp_path / "ppo") == PromptForm("text")  # what the policy itself is trained on


def test_a_tokenizer_of_the_users_own_is_compared_with_that_of_training(trained, chat_tokenizer, caplog):
    chat_tokenizer.chat_template = "{# other #}" + chat_tokenizer.chat_template
    functions = RewardFunctions(trained("messages"), processing_classes=chat_tokenizer)
    functions.score(*AS_MESSAGES)
    # The tokenizer was changed before the training, too, so it is the same.
    assert not lines(caplog, "another chat template")
    functions.funcs[0].tokenizer.chat_template += " "
    functions.score(*AS_MESSAGES)
    assert len(lines(caplog, "another chat template")) == 1


# --- one pair, or lists ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, completion", [("ab", "cd"), ("ab", "c"), ("", ""), (asked("ab"), "cd"), (asked("ab"), answered("cd"))]
)
def test_one_pair_is_one_score(make_trainer, pairs_of_a_module, chat_tokenizer, prompt, completion):
    scorer = RewardScorer(make_trainer(pairs_of_a_module["text"], max_steps=1).model, chat_tokenizer)
    assert scorer(prompt, completion) == scorer([prompt], [completion])
    assert scorer.raw(prompt, completion) == scorer.raw([prompt], [completion])
    assert len(scorer(prompt, completion)) == 1


@pytest.mark.parametrize(
    "prompts, completions, words",
    [
        ("ab", ["c", "d"], "prompts is one string, but completions is not"),
        (["a", "b"], "cd", "completions is one string, but prompts is not"),
        (asked("a"), ["b"], "prompts is one conversation, but completions is not"),
        ({"prompt": "a"}, ["b"], "prompts is a dict: give a list"),
        (["a"], None, "completions is a NoneType: give a list"),
        (["a"], b"b", "completions is a bytes: give a list"),
        (["a"], ["b", "c"], "completions: 2 for 1 prompts"),
        ([1], ["b"], r"prompts\[0\] is a int"),
    ],
)
def test_what_is_no_pair_is_refused_in_one_line(prompts, completions, words):
    with pytest.raises(UserError, match=words):
        as_lists(prompts, completions)


def test_every_kind_of_list_is_taken():
    expected = ["a", "b"], ["c", "d"]
    table = Dataset.from_dict({"prompt": expected[0], "completion": expected[1]})
    assert as_lists(table["prompt"], table["completion"]) == expected
    assert as_lists(tuple("ab"), (letter for letter in "cd")) == expected
    assert as_lists(np.array(["a", "b"]), np.array(["c", "d"])) == expected
    assert as_lists([], []) == ([], [])


# --- the check of a reward model -------------------------------------------------------------------------------------


def test_rows_of_text_are_counted_in_the_form_in_which_they_are_scored(chat_tokenizer):
    asked_form = FormOfTraining(PromptForm("messages", template_digest(chat_tokenizer)))
    text = {"prompt": "Why?", "completions": ["So.", "No."]}
    messages = {"prompt": asked("Why?"), "completions": [answered("So."), answered("No.")]}
    n_tokens = longest(tokenize_row(messages, chat_tokenizer))
    assert longest(tokenize_row(text, chat_tokenizer)) < n_tokens - 1
    for limit, fit in ((n_tokens, True), (n_tokens - 1, False)):
        assert within(chat_tokenizer, limit, asked_form)("Why?", "So.") == fit
    assert len(fitting(Dataset.from_list([text]), chat_tokenizer, n_tokens, asked_form)) == 1
    with pytest.raises(UserError, match="no row can be scored"):
        fitting(Dataset.from_list([text]), chat_tokenizer, n_tokens - 1, asked_form)
